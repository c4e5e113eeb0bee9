import fs from "node:fs";
import ort from "onnxruntime-node";
import { PNG } from "pngjs";
import { imageKey, stream } from "./noise.mjs";

const bundle = "bundle"; // the weights, model.safetensors, are found beside the graph
const { image_shape: shape, latent_shapes } = JSON.parse(fs.readFileSync(`${bundle}/manifest.json`));
const session = await ort.InferenceSession.create(`${bundle}/score.onnx`);
const rgba = PNG.sync.read(fs.readFileSync("cat.png")).data; // an opaque picture of the model's size
const pixels = Uint8Array.from(rgba.filter((_, i) => i % 4 < 3));

const noise = stream(await imageKey(0, pixels));
const inputs = { images: new ort.Tensor("uint8", pixels, [1, ...shape]) };
latent_shapes.forEach((dims, level) => {
  const count = dims.reduce((a, b) => a * b);
  inputs[`eps_${level}`] = new ort.Tensor("float32", noise.normal(count), [1, ...dims]);
});
inputs.u = new ort.Tensor("float32", noise.uniform(pixels.length), [1, ...shape]);

const { parts } = await session.run(inputs, ["parts"]);
console.log("bits per dimension:", parts.data.reduce((sum, part) => sum + part, 8));
