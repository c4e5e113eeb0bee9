"""Lossless compression with a model: ``ade compress`` and ``ade decompress``."""

from ade_base.extensions import Extension, Graphs, Verb

EXTENSION = Extension(
    verbs={
        "compress": Verb(
            "compress images without loss, with a bundle's model",
            "extensions.codec.verbs.compress",
            "codec",
        ),
        "decompress": Verb(
            "restore the images of an archive of ade compress",
            "extensions.codec.verbs.decompress",
            "codec",
        ),
    },
    graphs={
        "codec": Graphs(
            "what ade compress needs",
            "extensions.codec.graphs:check_codable",
            "extensions.codec.graphs:write_codec",
            ("compress", "IMAGES", "OUT.ade", "--bundle"),
        )
    },
)
