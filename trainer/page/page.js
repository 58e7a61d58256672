"use strict";
// Decodes in windows of whole coarse tokens, each with CONTEXT tokens of its neighbours on both sides: these cover the
// decoder's receptive field, so that the pieces together are the decode of the whole.
const RATE = 48000, PER_COARSE = 4096, TOKENS = 7, CODEBOOK = 4096, CONTEXT = 3, WINDOW = 12;
const element = (id) => document.getElementById(id);
let session = null, address = null;

const unpacked = (base64) => Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));

async function load() {
  const glue = new Blob([unpacked(window.assets.ort_glue)], { type: "text/javascript" });
  ort.env.wasm.wasmBinary = unpacked(window.assets.ort_wasm).buffer;
  ort.env.wasm.wasmPaths = { mjs: URL.createObjectURL(glue) };
  ort.env.wasm.numThreads = window.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
  session = await ort.InferenceSession.create(unpacked(window.assets.decoder_model), { executionProviders: ["wasm"] });
  window.assets = null;
  say("Ready.");
}

function say(text, wrong = false) {
  element("message").textContent = text;
  element("message").className = wrong ? "wrong" : "";
}

// A .npy of one row of int16 → (T, 7) tokens, coarse to fine. Throws what was found and expected.
function parsed(buffer) {
  const bytes = new Uint8Array(buffer), view = new DataView(buffer);
  if (bytes.length < 12 || String.fromCharCode(...bytes.slice(1, 6)) !== "NUMPY" || bytes[0] !== 0x93)
    throw new Error("this is not a .npy file");
  const long = bytes[6] > 1, start = long ? 12 : 10;
  const end = start + (long ? view.getUint32(8, true) : view.getUint16(8, true));
  const header = new TextDecoder().decode(bytes.slice(start, end));
  const type = /'descr': *'([^']*)'/.exec(header), shape = /'shape': *\(([^)]*)\)/.exec(header);
  if (!type || !shape) throw new Error("the .npy header names no type and shape: the file is damaged");
  if (type[1] !== "<i2") throw new Error(`codes are of type ${type[1]}, expected <i2 (int16)`);
  if (!/^\d+,$/.test(shape[1].trim())) throw new Error(`codes are of shape (${shape[1]}), expected one row`);
  const count = parseInt(shape[1], 10);
  if (bytes.length - end !== 2 * count)
    throw new Error(`the file holds ${bytes.length - end} bytes of codes, its header promises ${2 * count}`);
  if (!count || count % TOKENS) throw new Error(`${count} tokens are not T + 2T + 4T`);
  const flat = new Int16Array(buffer.slice(end)), coarse = count / TOKENS;
  const wrong = flat.find((token) => token < 0 || token >= CODEBOOK);
  if (wrong !== undefined) throw new Error(`token ${wrong} found, expected 0 to ${CODEBOOK - 1}`);
  return { coarse, levels: [flat.slice(0, coarse), flat.slice(coarse, 3 * coarse), flat.slice(3 * coarse)] };
}

async function decoded({ coarse, levels }, progress) {
  const wav = new Float32Array(coarse * PER_COARSE);
  for (let start = 0; start < coarse; start += WINDOW) {
    const stop = Math.min(start + WINDOW, coarse);
    const left = Math.max(start - CONTEXT, 0), right = Math.min(stop + CONTEXT, coarse);
    const feeds = {};
    levels.forEach((level, n) => {
      const part = BigInt64Array.from(level.slice(left << n, right << n), BigInt);
      feeds[`audio_codes.${n}`] = new ort.Tensor("int64", part, [1, part.length]);
    });
    const { data } = (await session.run(feeds)).audio_values;
    wav.set(data.subarray((start - left) * PER_COARSE, (stop - left) * PER_COARSE), start * PER_COARSE);
    progress(stop / coarse);
    await new Promise((resume) => setTimeout(resume));
  }
  return wav;
}

// Full scale is ±1; beyond it samples are clipped, never wrapped.
function wavFile(samples) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (at, word) => [...word].forEach((c, n) => view.setUint8(at + n, c.charCodeAt(0)));
  text(0, "RIFF"); view.setUint32(4, 36 + 2 * samples.length, true); text(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 1, true);
  view.setUint32(24, RATE, true); view.setUint32(28, 2 * RATE, true); view.setUint16(32, 2, true);
  view.setUint16(34, 16, true); text(36, "data"); view.setUint32(40, 2 * samples.length, true);
  samples.forEach((x, n) => view.setInt16(44 + 2 * n, Math.max(-32768, Math.min(32767, Math.round(x * 32768))), true));
  return new Blob([view], { type: "audio/wav" });
}

// In place, length a power of two.
function fft(re, im) {
  const n = re.length;
  for (let i = 1, j = 0; i < n; i++) {
    let bit = n >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) { [re[i], re[j]] = [re[j], re[i]]; [im[i], im[j]] = [im[j], im[i]]; }
  }
  for (let size = 2; size <= n; size *= 2)
    for (let k = 0; k < size / 2; k++) {
      const c = Math.cos(2 * Math.PI * k / size), s = -Math.sin(2 * Math.PI * k / size);
      for (let a = k; a < n; a += size) {
        const b = a + size / 2, x = re[b] * c - im[b] * s, y = re[b] * s + im[b] * c;
        re[b] = re[a] - x; im[b] = im[a] - y; re[a] += x; im[a] += y;
      }
    }
}

// Hann window of 1024 samples; a column of the picture is a moment, a row 46.9 Hz; black is 100 dB below the loudest.
function draw(samples, canvas) {
  const size = 1024, columns = canvas.width, rows = canvas.height, power = new Float32Array(columns * rows);
  for (let column = 0; column < columns; column++) {
    const re = new Float32Array(size), im = new Float32Array(size);
    const first = Math.round(column * samples.length / columns) - size / 2;
    for (let n = 0; n < size; n++)
      re[n] = (samples[first + n] || 0) * (0.5 - 0.5 * Math.cos(2 * Math.PI * n / size));
    fft(re, im);
    for (let row = 0; row < rows; row++) power[row * columns + column] = re[row] ** 2 + im[row] ** 2;
  }
  const loudest = 10 * Math.log10(power.reduce((a, b) => Math.max(a, b), 1e-20));
  const context = canvas.getContext("2d"), picture = context.createImageData(columns, rows);
  for (let row = 0; row < rows; row++)
    for (let column = 0; column < columns; column++) {
      const level = 1 + (10 * Math.log10(power[row * columns + column] + 1e-20) - loudest) / 100;
      const v = Math.max(0, Math.min(1, level)), at = 4 * ((rows - 1 - row) * columns + column);
      picture.data.set([255 * Math.min(1, 1.6 * v), 255 * Math.max(0, 1.8 * v - 0.8), 255 * (v < 0.5 ? v : 1 - v), 255], at);
    }
  context.putImageData(picture, 0, 0);
}

async function decode(file) {
  if (!session) return; // why has been said
  element("player").pause();
  element("result").hidden = true;
  element("bar").hidden = false;
  try {
    const codes = parsed(await file.arrayBuffer()), began = performance.now();
    say("Decoding …");
    const samples = await decoded(codes, (part) => { element("bar").value = part; });
    const took = (performance.now() - began) / 1000, seconds = samples.length / RATE;
    if (address) URL.revokeObjectURL(address);
    address = URL.createObjectURL(wavFile(samples));
    element("player").src = element("save").href = address;
    element("save").download = file.name.replace(/\.npy$/, "") + ".48k.wav";
    element("name").textContent = file.name;
    element("seconds").textContent = `${seconds.toFixed(2)} s`;
    element("picture").setAttribute("aria-label", `Spectrogram of ${file.name}, ${seconds.toFixed(2)} s, 0 to 24 kHz`);
    draw(samples, element("picture"));
    element("result").hidden = false;
    window.result = { samples, took, seconds };
    say(`${seconds.toFixed(2)} s of audio in ${took.toFixed(2)} s: real-time factor ${(took / seconds).toFixed(2)}.`);
  } catch (error) {
    say(`${file.name}: ${error.message}`, true);
  } finally {
    element("bar").hidden = true;
  }
}

element("about").textContent = window.about;
let work = load().catch((error) => say(`The decoder could not be loaded: ${error.message}`, true));

// One file after another, the first once the decoder is there: of those chosen meanwhile the last is shown last.
function take(files) {
  const [file] = files;
  if (file) work = work.then(() => decode(file));
}

element("file").addEventListener("click", (event) => { event.target.value = ""; }); // so that one can be chosen again
element("file").addEventListener("change", (event) => take(event.target.files));
for (const kind of ["dragover", "dragleave", "drop"])
  element("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    element("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") take(event.dataTransfer.files);
  });
