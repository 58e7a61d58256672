// The keyboard: in the players, or in the blind test while it runs.

const STEP_SECONDS = 0.5;
let blindKeys = null; // (key) → whether it was meant for the blind test

function moveTo(place) {
  const card = cards[(place + cards.length) % cards.length];
  const goesOn = playing?.isPlaying;
  steer(card, () => (goesOn ? card.deck.play() : null));
  card.element.scrollIntoView({ block: "nearest" });
  card.play.focus({ preventScroll: true });
}

const listenKeys = {
  " ": () => steer(steered, () => steered.deck.toggle()),
  ArrowLeft: () => steered.deck.seek(steered.deck.position() - STEP_SECONDS),
  ArrowRight: () => steered.deck.seek(steered.deck.position() + STEP_SECONDS),
  n: () => moveTo(cards.indexOf(steered) + 1),
  p: () => moveTo(cards.indexOf(steered) - 1),
};

function listenKey(key) {
  const version = steered.versions[Number(key) - 1];
  if (/^[1-9]$/.test(key) && version) {
    steer(steered, () => steered.deck.select(version.dataset.system));
  } else if (key in listenKeys) {
    listenKeys[key]();
  } else {
    return false;
  }
  return true;
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const target = event.target;
  if (target.matches("select, summary, a, .scroll") || (target.matches("input:not(.seek)") && !/^[0-9np]$/.test(event.key))) return;
  if (target.matches("button") && (event.key === " " || event.key === "Enter")) return; // it presses the button
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (blindKeys ? blindKeys(key) : listenKey(key)) event.preventDefault();
});
