// Decks: all versions of a clip as sample-synchronous WebAudio sources, of which one is heard.

const data = JSON.parse(document.getElementById("data").textContent);
const labels = new Map(data.systems.map(({ name, label }) => [name, label]));
const SWITCH_SECONDS = 0.008; // cross-fade between versions
const AHEAD_SECONDS = 0.03; // sources start together, a little later

let context = null; // made by the first gesture, as browsers demand
let playing = null; // at most one deck sounds

class Deck {
  constructor(clip) {
    this.clip = clip;
    this.seconds = data.clips[clip].seconds;
    this.versions = data.clips[clip].versions;
    this.current = this.versions[0].system;
    this.offset = 0; // where it stands when it does not run
    this.started = null; // context time at which offset was heard
    this.nodes = new Map(); // system → { source, gain }
    this.listeners = [];
  }

  changed() {
    for (const listener of this.listeners) listener(this);
  }

  get isPlaying() {
    return this.started !== null;
  }

  position() {
    if (!this.isPlaying) return this.offset;
    const heard = this.offset + Math.max(context.currentTime - this.started, 0);
    return isLooping() ? heard % this.seconds : Math.min(heard, this.seconds);
  }

  async load() {
    this.buffers ??= this.decode();
    return this.buffers;
  }

  async decode() {
    const encoded = JSON.parse(document.getElementById(`audio-${this.clip}`).textContent);
    const decoded = this.versions.map(async ({ system }) => {
      const bytes = Uint8Array.from(atob(encoded[system]), (character) => character.charCodeAt(0));
      return [system, await context.decodeAudioData(bytes.buffer)];
    });
    return new Map(await Promise.all(decoded));
  }

  async play() {
    context ??= new AudioContext({ sampleRate: 48000 });
    if (playing && playing !== this) playing.pause();
    playing = this;
    await context.resume();
    const buffers = await this.load();
    if (playing !== this || this.isPlaying) return; // another gesture came first
    if (this.offset >= this.seconds) this.offset = 0;
    this.started = context.currentTime + AHEAD_SECONDS;
    for (const { system } of this.versions) {
      const source = new AudioBufferSourceNode(context, { buffer: buffers.get(system), loop: isLooping() });
      const gain = new GainNode(context, { gain: this.level(system) });
      source.connect(gain).connect(context.destination);
      source.start(this.started, this.offset);
      this.nodes.set(system, { source, gain });
    }
    const first = this.nodes.get(this.versions[0].system).source;
    first.addEventListener("ended", () => {
      if (this.nodes.get(this.versions[0].system)?.source === first) this.stop(this.seconds);
    });
    this.changed();
  }

  level(system) {
    const { gainDb } = this.versions.find((version) => version.system === system);
    return system === this.current ? 10 ** (gainDb / 20) : 0;
  }

  stop(offset) {
    for (const { source } of this.nodes.values()) source.stop();
    this.nodes.clear();
    this.offset = offset;
    this.started = null;
    this.changed();
  }

  pause() {
    if (this.isPlaying) this.stop(this.position());
    if (playing === this) playing = null;
  }

  toggle() {
    return this.isPlaying ? this.pause() : this.play();
  }

  async seek(seconds) {
    const goesOn = this.isPlaying;
    this.stop(Math.min(Math.max(seconds, 0), this.seconds));
    if (goesOn) await this.play();
  }

  select(system) {
    this.current = system;
    for (const [name, { gain }] of this.nodes) {
      gain.gain.cancelScheduledValues(context.currentTime);
      gain.gain.setValueAtTime(gain.gain.value, context.currentTime);
      gain.gain.linearRampToValueAtTime(this.level(name), context.currentTime + SWITCH_SECONDS);
    }
    this.changed();
  }
}

// A browser that cannot decode or play says so where people look.
addEventListener("unhandledrejection", (event) => {
  const trouble = document.getElementById("trouble");
  trouble.textContent = `This browser cannot play the audio: ${event.reason?.message ?? event.reason}`;
  trouble.hidden = false;
});

const loopBox = document.getElementById("loop");
const isLooping = () => loopBox.checked;
loopBox.addEventListener("change", () => {
  if (playing?.isPlaying) playing.seek(playing.position());
});

// The card of each clip shows its deck and steers it.

const cards = [...document.querySelectorAll(".clip")].map((element) => {
  const deck = new Deck(Number(element.dataset.clip));
  const card = {
    element,
    deck,
    play: element.querySelector(".play"),
    seek: element.querySelector(".seek"),
    time: element.querySelector(".time"),
    versions: [...element.querySelectorAll(".version")],
  };
  deck.listeners.push(() => show(card));
  element.addEventListener("focusin", () => steer(card, () => null));
  card.play.addEventListener("click", () => steer(card, () => deck.toggle()));
  card.seek.addEventListener("input", () => steer(card, () => deck.seek(Number(card.seek.value))));
  for (const version of card.versions) {
    version.addEventListener("click", () => steer(card, () => deck.select(version.dataset.system)));
  }
  return card;
});

let steered = cards[0]; // what the keys mean

function steer(card, action) {
  steered = card;
  blindKeys = null;
  for (const { element } of cards) element.classList.toggle("steered", element === card.element);
  return action();
}

function show(card) {
  const { deck, element, play, versions } = card;
  element.classList.toggle("playing", deck.isPlaying);
  play.setAttribute("aria-label", `${deck.isPlaying ? "Pause" : "Play"} ${data.clips[deck.clip].name}`);
  for (const version of versions) {
    version.setAttribute("aria-pressed", String(version.dataset.system === deck.current));
  }
  showPosition(card);
  if (deck.isPlaying) card.frame ??= requestAnimationFrame(() => follow(card));
}

function follow(card) {
  card.frame = null;
  if (card.deck.isPlaying) show(card);
}

function showPosition({ deck, seek, time, versions }) {
  const position = deck.position();
  seek.value = position;
  time.value = `${position.toFixed(1)} / ${deck.seconds.toFixed(1)} s`;
  for (const version of versions) {
    version.querySelector(".head").style.left = `${(100 * position) / deck.seconds}%`;
  }
}
