"""A handler of TorchServe with the gate in front of a classifier."""

import json
import logging

import onnxruntime

from ade_base.pictures.read import read_image
from ade_base.pictures.show import resize_centre
from serving.gate import Gate

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class GatedClassifier:
    def initialize(self, context):
        options = context.model_yaml_config["gate"]
        self.gate = Gate(options["bundle"], options["alpha"])
        folder = context.system_properties["model_dir"]
        self.classifier = onnxruntime.InferenceSession(f"{folder}/classifier.onnx")

    def handle(self, data, context):
        bodies = [row.get("body") or row.get("data") for row in data]
        files = [bytes(body) if isinstance(body, (bytes, bytearray)) else b"" for body in bodies]
        try:
            decisions = self.gate.check(files)
            answers = [self.answer(*pair) for pair in zip(files, decisions, strict=True)]
        except Exception:
            logging.getLogger(__name__).exception("the gate or the classifier failed")
            answers = [(503, {"error": "unavailable"})] * len(files)
        for row, (status, _) in enumerate(answers):
            context.set_response_status(status, idx=row)
        return [json.dumps(answer) for _, answer in answers]

    def answer(self, file, decision):
        if not decision.accepted:  # rejected, no verdict, or not an image
            return 422, {"error": decision.decision, "reason": decision.reason}
        image = resize_centre(read_image(file).pixels, 32, 32)  # as the gate saw it
        (logits,) = self.classifier.run(["logits"], {"images": image[None]})
        return 200, {"label": CLASSES[logits[0].argmax()], "p_value": decision.p_value}
