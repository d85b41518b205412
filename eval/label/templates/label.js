// Run by Gradio once the markup stands: `element` holds it, `server` calls eval/label/page.py.
// Prompts are only ever set as text.
const root = element.querySelector("#label");
const find = (selector) => root.querySelector(selector);
const sides = [find("#left img"), find("#right img")];
const KEYS = {
  ArrowLeft: "left", 1: "left", ArrowRight: "right", 2: "right",
  ArrowDown: "tie", 0: "tie", t: "tie", s: "skip",
};
let state = null; // what the server said last
let since = 0; // when both images stood there
let busy = true;
let over = false; // all was answered

function say(text, again) {
  root.dataset.state = "over";
  find("#message").hidden = false;
  find("#message p").textContent = text;
  find("#message button").hidden = !again;
}

async function ask(call, ...given) {
  if (busy && call !== server.current) return;
  busy = true;
  try {
    const told = await call(...given);
    if (!told) throw new Error("no answer");
    if (told.failed) say(told.failed, true);
    else await show(told);
  } catch (error) {
    say("The page has lost its program. All answers so far are kept.\nStart it again, and try again.", true);
  } finally {
    busy = false;
  }
}

async function show(told) {
  state = told;
  find("#message").hidden = true;
  find("#who").textContent = told.rater;
  find("#count").textContent = `${told.done} of ${told.all}`;
  find("#bar i").style.width = `${(100 * told.done) / Math.max(told.all, 1)}%`;
  find("#undo").disabled = !told.undo;
  if (!find("#standing").hidden) numbers();
  if (told.token === null) {
    say("All is answered. Thank you.\nStop ends the program, which then writes the pairs.", false);
    if (find("#standing").hidden) toggleNumbers();
    over = true;
    return;
  }
  if (over) toggleNumbers(); // the end had opened them
  over = false;
  root.dataset.state = "loading";
  root.dataset.token = told.token;
  for (const side of root.querySelectorAll(".picture")) side.classList.remove("chosen");
  find("#prompt").textContent = told.prompt;
  find("#prompt").scrollTop = 0;
  const given = find("#references");
  given.hidden = told.references.length === 0;
  given.replaceChildren(...told.references.map((url) => {
    const image = new Image();
    image.src = url;
    image.alt = "given with the prompt";
    return image;
  }));
  sides.forEach((image, k) => (image.src = told.images[k]));
  const loaded = await Promise.allSettled(sides.map((image) => image.decode()));
  const whole = loaded.every((x) => x.status === "fulfilled");
  sides.forEach((image) => image.classList.toggle("small", image.naturalWidth * 2 < image.clientWidth));
  for (const button of root.querySelectorAll("#choices button, .picture")) {
    button.disabled = !whole && button.dataset.choice !== "skip";
  }
  root.dataset.state = whole ? "ready" : "broken";
  since = performance.now();
  for (const url of told.next) new Image().src = url; // so that the next pair stands at once
}

function choose(choice) {
  if (busy || !state || state.token === null) return;
  if (root.dataset.state !== "ready" && !(root.dataset.state === "broken" && choice === "skip")) return;
  const seconds = (performance.now() - since) / 1000;
  if (choice === "left" || choice === "right") find("#" + choice).classList.add("chosen");
  ask(server.answer, { token: state.token, choice, seconds });
}

async function numbers() {
  const rows = await server.numbers(null);
  find("#standing table").replaceChildren(...rows.map(([what, value]) => {
    const row = document.createElement("tr");
    for (const [kind, text] of [["th", what], ["td", value]]) {
      row.appendChild(document.createElement(kind)).textContent = text;
    }
    return row;
  }));
}

function toggleNumbers() {
  const panel = find("#standing");
  panel.hidden = !panel.hidden;
  find("#numbers").setAttribute("aria-expanded", String(!panel.hidden));
  if (!panel.hidden) numbers();
}

function undo() {
  if (state && state.undo) ask(server.undo, null);
}

let sure = null;
async function end() {
  const button = find("#end");
  if (sure === null) {
    button.textContent = "really stop?";
    sure = setTimeout(() => { button.textContent = "stop"; sure = null; }, 3000);
    return;
  }
  clearTimeout(sure);
  button.textContent = "stopped";
  busy = true;
  await server.end(null);
  say("Stopped. All answers are kept; this tab can be closed.", false);
  for (const other of root.querySelectorAll("nav button")) other.disabled = true;
}

function theme() {
  const page = document.documentElement;
  const dark = getComputedStyle(page).colorScheme === "dark";
  page.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("label-theme", page.dataset.theme);
}

root.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.id === "undo") undo();
  else if (button.id === "numbers") toggleNumbers();
  else if (button.id === "theme") theme();
  else if (button.id === "end") end();
  else if (button.parentElement.id === "message") ask(server.current, null);
  else choose(button.dataset.choice ?? button.id);
  button.blur(); // else the space bar would press it again
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key in KEYS) choose(KEYS[key]);
  else if (key === "Backspace" || key === "u") undo();
  else if (key === "n") toggleNumbers();
  else return;
  event.preventDefault();
});

const kept = localStorage.getItem("label-theme");
if (kept) document.documentElement.dataset.theme = kept;
ask(server.current, null);
