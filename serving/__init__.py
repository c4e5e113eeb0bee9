"""Everything that serves a bundle: the engine, the HTTP contract, the client and the web page.

Needs only a bundle and works on NumPy arrays. Does not import the model's or the training code.

The way of an image to its score::

    bytes -> pixels        serving.ingest: forms, requests, picture
    pixels -> noise        serving.engine.noise, a function of the pixels
    both -> parts          serving.engine.engine, by the bundle's graph "score", whose inputs and
                           outputs serving.engine.signatures lists: x -> flow -> y -> encoder -> z
                           -> bound, one part per term
    parts -> bpd           InferenceEngine.score: 8 and their sum, combined over the draws
    -> p-value, decision   serving.verdict
    -> answer              serving.api.operations.score, serving.gate
"""
