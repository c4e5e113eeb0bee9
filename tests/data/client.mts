// Calls all four operations with openapi-fetch and the types of openapi-typescript.
// Arguments: URL of the service, an image in base64.
import createClient from "openapi-fetch";
import type { components, paths } from "./api.js";

declare const process: { argv: string[] };
const [, , url, image] = process.argv;
const client = createClient<paths>({ baseUrl: url });

function check(condition: boolean, what: unknown): asserts condition {
  if (!condition) throw new Error(JSON.stringify(what));
}

const drawn = await client.POST("/predictions/sample", { body: { n: 2, seed: 7, format: "json" } });
const sample = drawn.data as components["schemas"]["SampleAnswer"];
check(sample.seed === 7 && sample.results.length === 2, drawn.error);
check(drawn.response.headers.get("x-ade-model") !== null, "no X-Ade-Model");

const encoded = await client.POST("/predictions/encode", { body: { images: [image] } });
const latents = encoded.data as components["schemas"]["EncodeAnswer"];
check("levels" in latents.results[0] && latents.results[0].levels.length === 3, encoded.error);

const rebuilt = await client.POST("/predictions/reconstruct", { body: { images: [image], format: "json" } });
const picture = rebuilt.data as components["schemas"]["ReconstructAnswer"];
check("image" in picture.results[0], rebuilt.error);

const scored = await client.POST("/predictions/score", { body: { images: [image, "junk"] } });
const [good, bad] = (scored.data as components["schemas"]["ScoreAnswer"]).results;
check("bpd" in good && "decision" in good && "error" in bad && bad.error.code === "not_an_image", scored.error);

const refused = await client.POST("/predictions/score", { body: { images: ["junk"] } });
check(refused.data === undefined && refused.error?.error.code === "not_an_image", refused);

console.log(good.decision);
