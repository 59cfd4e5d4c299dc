// Keys, time spent, and what would otherwise be forgotten between two pages. Everything works without it, but slower.
"use strict";
(() => {
  const typing = (element) => element instanceof HTMLTextAreaElement || (element instanceof HTMLInputElement && element.type !== "checkbox");

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.isComposing) return;
    if (typing(event.target)) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const wanted = event.key.toLowerCase();
    const found = [...document.querySelectorAll("[data-key]")].find((element) => element.dataset.key === wanted);
    if (found) {
      event.preventDefault();
      found.click();
    }
  });

  // an invitation link carries its code behind the #, which browsers send nowhere
  const code = document.getElementById("code");
  const fill = () => {
    if (!code || location.hash.length < 2) return;
    code.value = location.hash.slice(1);
    history.replaceState(null, "", location.pathname);
    code.form.querySelector("button").focus();
  };
  fill();
  addEventListener("hashchange", fill);

  // the second of two clicks must not answer the next task
  let sent = false;
  addEventListener("pageshow", () => { sent = false; });
  document.addEventListener("submit", (event) => {
    if (event.target.dataset.download) return;
    if (sent) event.preventDefault();
    sent = true;
  });

  const token = document.querySelector("#vote [name=token]");
  if (!token) return;

  // differences stay shown from one task to the next
  const differences = document.getElementById("differences");
  if (differences && !differences.disabled) {
    differences.checked = sessionStorage.getItem("differences") === "1";
    differences.addEventListener("change", () => sessionStorage.setItem("differences", differences.checked ? "1" : "0"));
  }

  // seconds for which the task was in view, also when the page was reloaded meanwhile
  const [lease, before] = (sessionStorage.getItem("seen") || " 0").split(" ");
  let seen = lease === token.value ? Number(before) : 0;
  let since = document.hidden ? null : performance.now();
  const count = () => {
    if (since !== null) seen += performance.now() - since;
    since = document.hidden ? null : performance.now();
    sessionStorage.setItem("seen", `${token.value} ${Math.round(seen)}`);
  };
  document.addEventListener("visibilitychange", count);
  addEventListener("pagehide", count);
  token.form.addEventListener("submit", () => {
    count();
    token.form.elements.seconds.value = (seen / 1000).toFixed(1);
  });
})();
