// Keys for what the page has as buttons, the slider, and the bar of an update. The next page takes
// the place of this one without a navigation, so that keys that are pressed meanwhile can wait.
"use strict";
const LATE = 1000; // ms: a key from so long before a text was shown was not meant for it
const BOUNCE = 100; // ms: a second press must not decide the next text
const NO_ANSWER = "The page does not answer; is the program running?";
let loading = false;
const waiting = []; // events of keys, in order
let last = { key: "", timeStamp: -BOUNCE };

const one = (selector) => document.querySelector(selector);
const say = (words) => {
  const problem = document.createElement("p");
  problem.className = "problem";
  problem.setAttribute("role", "alert");
  problem.textContent = words;
  one("main").prepend(problem);
};

const load = async (address, how = {}, seen = false) => {
  loading = document.body.inert = true; // no click, and no key for what is going away
  try {
    const answer = await fetch(address, how);
    const next = new DOMParser().parseFromString(await answer.text(), "text/html");
    document.title = next.title;
    document.body.replaceWith(next.body);
    const now = how.method && !answer.redirected ? location.href : answer.url;
    history[seen || now === location.href ? "replaceState" : "pushState"](null, "", now);
    scrollTo(0, 0);
    begin();
  } catch { say(NO_ANSWER); }
  loading = document.body.inert = false;
  one("[autofocus]")?.focus();
  replay();
};

document.addEventListener("submit", (event) => {
  event.preventDefault();
  if (loading) return;
  const form = event.target;
  const body = new URLSearchParams(new FormData(form, event.submitter));
  load(form.getAttribute("action"), { method: "POST", body }); // a button is named "action"
});
document.addEventListener("click", (event) => {
  const link = event.target.closest("a");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
  event.preventDefault();
  load(link.href);
});
addEventListener("popstate", () => load(location.href, {}, true));

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (!loading) return press(event, event.target);
  if (event.key.length > 1 && !["Enter", "Escape", "Backspace"].includes(event.key)) return;
  event.preventDefault();
  waiting.push(event);
});

const press = (event, at) => {
  if (at.matches("textarea, input:not([type=checkbox]):not([type=range])")) {
    if (event.key === "Escape") one("#text")?.focus();
    return;
  }
  const key = event.key.toLowerCase();
  const wanted = one("#keys");
  if (key === "enter" ? at.closest("a, button, summary") : wanted && !wanted.checked) return;
  const found = one(`[data-key="${CSS.escape(key)}"]:not(:disabled)`);
  if (!found) return;
  event.preventDefault();
  if (event.repeat) return; // a key that is held
  const bounced = event.key === last.key && event.timeStamp - last.timeStamp < BOUNCE;
  last = event;
  if (bounced && found.matches("button")) return; // a tick is only taken back
  if (found.matches("textarea")) found.focus();
  else found.click();
};

// What was pressed while the page was loading, on the page that came.
const replay = () => {
  const now = performance.now();
  const late = [];
  while (waiting.length && !loading) {
    const event = waiting.shift();
    const at = document.activeElement;
    if (at.matches("textarea") && event.key !== "Escape") write(at, event.key);
    else if (now - event.timeStamp < LATE || event.key === "e") press(event, at);
    else late.push(event.key);
  }
  if (late.length) say(`Keys that were pressed long before this text was shown were not used: ${late.join(" ")}`);
};
const write = (note, key) => {
  if (key === "Backspace") note.value = note.value.slice(0, -1);
  else note.value += key === "Enter" ? "\n" : key;
};

const begin = () => {
  const wanted = one("#keys");
  if (wanted) {
    wanted.closest("label").hidden = false;
    try { wanted.checked = localStorage.getItem("keys") !== "off"; } catch { /* not kept */ }
    wanted.addEventListener("change", () => {
      try { localStorage.setItem("keys", wanted.checked ? "on" : "off"); } catch { /* not kept */ }
    });
  }
  const slider = one("#slider");
  if (slider) {
    const number = one("#number");
    slider.hidden = false;
    slider.addEventListener("input", () => { number.value = slider.value; });
    number.addEventListener("input", () => { slider.value = number.value; });
  }
  if (one("#learning")?.dataset.running === "yes") follow(one("#learning"));
};

const follow = async (learning) => {
  const bar = one("#bar");
  const update = one("#update");
  try {
    const state = await (await fetch(learning.dataset.state)).json();
    bar.value = state.share;
    if (learning.textContent !== state.words) learning.textContent = state.words;
    if (state.running && learning.isConnected) { setTimeout(follow, 700, learning); return; }
    bar.hidden = true;
    learning.textContent += " The next text comes from the new queue.";
    update.disabled = false;
  } catch { learning.textContent = NO_ANSWER; }
};

begin();
