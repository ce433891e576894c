// Keyboard shortcuts, which can be switched off (WCAG 2.1.4). Without this file the page does all the rest.
"use strict";
{
  const STORED = "rlhf_gym shortcuts";
  const root = document.documentElement;
  const line = document.querySelector(".shortcuts");
  const toggle = document.querySelector("[data-shortcuts]");
  const stored = () => { try { return localStorage.getItem(STORED); } catch { return null; } };
  let on = stored() !== "off";

  const show = () => {
    root.classList.toggle("with-keys", on);
    toggle?.setAttribute("aria-pressed", String(on));
    for (const button of document.querySelectorAll("[data-key]")) {
      if (on) button.setAttribute("aria-keyshortcuts", button.dataset.key);
      else button.removeAttribute("aria-keyshortcuts");
    }
  };

  line?.removeAttribute("hidden");
  toggle?.addEventListener("click", () => {
    on = !on;
    try { localStorage.setItem(STORED, on ? "on" : "off"); } catch { /* for this page, then */ }
    show();
  });
  show();

  // While somebody types, a letter is a letter.
  const typing = (target) => target.matches?.("textarea, select, input:not([type=radio]):not([type=checkbox])");

  document.addEventListener("keydown", (event) => {
    if (!on || event.repeat || event.isComposing || event.ctrlKey || event.metaKey || event.altKey) return;
    if (typing(event.target)) return;
    const key = event.key.toLowerCase();
    if (/^[0-9]$/.test(key) && event.target.matches?.(".scale input")) {
      // Whoever is rating means the rating, and not the answer with that number.
      event.target.closest(".scale").querySelector(`input[value="${key}"]`)?.click();
      return;
    }
    const button = [...document.querySelectorAll("[data-key]")].find((each) => each.dataset.key === key);
    if (!button) return;
    event.preventDefault();
    button.click();
  });
}
