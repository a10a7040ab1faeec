"use strict";
// Tokens that show the model's predictions on hover and with the arrow keys.
const surprise = (() => {
  const shown = (text) => text.replaceAll("\n", "↵") || "∅";
  const quoted = (text) => "“" + shown(text).replace(/^ /, "·") + "”";
  const percent = (p) => p >= 0.1 ? (100 * p).toFixed(0) + "%" : p >= 0.001 ? (100 * p).toPrecision(2) + "%" : "1 in " + Math.round(1 / p).toLocaleString("en");
  const make = (tag, text, cls) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (cls) element.className = cls;
    return element;
  };
  const arrows = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1};
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  // A token has its text, its probability p, bits, rank (0: not among the alternatives) and others: pairs [text, p].
  const describe = (token) => {
    const list = make("ol");
    for (const [text, p] of token.others) {
      const item = make("li", undefined, text === token.text ? "true" : ""), bar = make("i");
      bar.style.width = 100 * p + "%";
      item.append(bar, make("span", shown(text).replace(/^ /, "·")), make("span", percent(p)));
      list.append(item);
    }
    const rank = token.rank === 0 ? "not in its top " + token.others.length : token.rank === 1 ? "its first choice" : "rank " + token.rank.toLocaleString("en");
    return [make("p", quoted(token.text), "token"), make("p", percent(token.p) + " · " + token.bits.toFixed(1) + " bits · " + rank, "odds"), make("p", "It predicted:", "resting"), list];
  };

  // Shows the predictions for the spans ".t" of `text`, numbered by data-i, in `note`; `at` returns the token of an index.
  // Returns a function that selects a token by its index.
  const explain = (text, note, at) => {
    let current = -1;
    const show = (index) => {
      const spans = text.querySelectorAll(".t");
      if (!spans.length) return;
      text.querySelector(".t.on")?.classList.remove("on");
      current = clamp(index, 0, spans.length - 1);
      spans[current].classList.add("on");
      note.replaceChildren(...describe(at(current)));
    };
    for (const kind of ["pointerover", "click"]) text.addEventListener(kind, (event) => { if (event.target.dataset.i) show(Number(event.target.dataset.i)); });
    text.addEventListener("focus", () => { if (!text.querySelector(".t.on")) show(0); });
    text.addEventListener("keydown", (event) => {
      if (!arrows[event.key]) return;
      event.preventDefault();
      show(current + arrows[event.key]);
    });
    return show;
  };
  return {make, quoted, clamp, arrows, explain};
})();
