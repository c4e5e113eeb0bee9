// Philox 4x64-10 (Salmon et al., 2011): the words of one key of 16 bytes, in order.
function* philox(key) {
  const view = new DataView(key.buffer, key.byteOffset, 16);
  const start = [view.getBigUint64(0, true), view.getBigUint64(8, true)];
  const low = (value) => BigInt.asUintN(64, value);
  for (let counter = 1n; ; counter++) {
    let [a, b, c, d] = [counter, 0n, 0n, 0n];
    let [k, l] = start;
    for (let round = 0; round < 10; round++) {
      const [p, q] = [0xd2e7470ee14c6c93n * a, 0xca5a826395121157n * c];
      [a, b, c, d] = [(q >> 64n) ^ b ^ k, low(q), (p >> 64n) ^ d ^ l, low(p)];
      [k, l] = [low(k + 0x9e3779b97f4a7c15n), low(l + 0xbb67ae8584caa73bn)];
    }
    yield* [a, b, c, d];
  }
}

export function stream(key) {
  const words = philox(key);
  const take = (count) => Array.from({ length: count }, () => words.next().value);
  return {
    uniform: (count) => Float32Array.from(take(count), (word) => Number(word >> 40n) / 2 ** 24),
    normal(count) {
      const pairs = Math.ceil(count / 2);
      const unit = take(2 * pairs).map((word) => (Number(word >> 11n) + 0.5) / 2 ** 53);
      const radius = unit.slice(0, pairs).map((value) => Math.sqrt(-2 * Math.log(value)));
      const angle = unit.slice(pairs).map((value) => 2 * Math.PI * value);
      const cosines = radius.map((r, i) => r * Math.cos(angle[i]));
      const sines = radius.map((r, i) => r * Math.sin(angle[i]));
      return Float32Array.from([...cosines, ...sines].slice(0, count));
    },
  };
}

const sha256 = async (bytes) => new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));

export async function imageKey(seed, pixels, draw = 0) {
  const text = new TextEncoder().encode(`ade image ${seed} ${draw} `);
  return (await sha256(new Uint8Array([...text, ...(await sha256(pixels))]))).slice(0, 16);
}
