// Keys for what the page has as buttons, the slider, and the bar of an update.
"use strict";
const text = document.getElementById("text");
const wanted = document.getElementById("keys");
let sent = false; // a second press must not decide the next text

const remembered = () => { try { return localStorage.getItem("keys") !== "off"; } catch { return true; } };
if (wanted) {
  wanted.closest("label").hidden = false;
  wanted.checked = remembered();
  wanted.addEventListener("change", () => {
    try { localStorage.setItem("keys", wanted.checked ? "on" : "off"); } catch { /* not kept */ }
  });
}

document.addEventListener("submit", (event) => {
  if (sent) event.preventDefault();
  sent = true;
});
window.addEventListener("pageshow", () => { sent = false; });

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const at = event.target;
  if (at.matches("textarea, input:not([type=checkbox]):not([type=range])")) {
    if (event.key === "Escape" && text) text.focus();
    return;
  }
  const key = event.key.toLowerCase();
  if (key === "enter" ? at.closest("a, button, summary") : wanted && !wanted.checked) return;
  const found = document.querySelector(`[data-key="${CSS.escape(key)}"]:not(:disabled)`);
  if (!found) return;
  event.preventDefault();
  if (event.repeat) return; // a key that is held
  if (found.matches("textarea")) found.focus();
  else found.click();
});

const slider = document.getElementById("slider");
if (slider) {
  const number = document.getElementById("number");
  slider.hidden = false;
  slider.addEventListener("input", () => { number.value = slider.value; });
  number.addEventListener("input", () => { slider.value = number.value; });
}

const learning = document.getElementById("learning");
if (learning && learning.dataset.running === "yes") {
  const bar = document.getElementById("bar");
  const ask = async () => {
    try {
      const state = await (await fetch(learning.dataset.state)).json();
      bar.value = state.share;
      if (learning.textContent !== state.words) learning.textContent = state.words;
      if (state.running) { setTimeout(ask, 700); return; }
      bar.hidden = true;
      learning.textContent += " The next text comes from the new queue.";
      document.getElementById("update").disabled = false;
    } catch { learning.textContent = "The page does not answer; is the program running?"; }
  };
  ask();
}
