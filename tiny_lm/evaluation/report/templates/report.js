(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const {make, quoted, clamp, arrows} = surprise;

  // --- charts: show values ---------------------------------------------------------------------------------------
  const svg = "http://www.w3.org/2000/svg";
  for (const figure of document.querySelectorAll("[data-chart]")) {
    const chart = data.charts[figure.dataset.chart];
    const plot = figure.querySelector(".plot > svg"), cursor = figure.querySelector(".cursor");
    const readout = figure.querySelector(".readout"), resting = readout.textContent;
    const steps = [...new Set(chart.lines.flatMap((line) => line.points.map((point) => point[0])))].sort((a, b) => a - b);
    const lefts = new Map(chart.lines.flatMap((line) => line.points.map((point) => [point[0], point[2]])));
    let at = steps.length - 1;
    const nearest = (points, step) => points.reduce((best, point) => Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best);
    const show = (index) => {
      at = clamp(index, 0, steps.length - 1);
      const step = steps[at], left = lefts.get(step) + "%";
      const line = document.createElementNS(svg, "line");
      for (const [key, value] of Object.entries({x1: left, x2: left, y1: "0", y2: "100%"})) line.setAttribute(key, value);
      const marks = chart.lines.map((series) => {
        const [, , across, top] = nearest(series.points, step), mark = document.createElementNS(svg, "circle");
        const position = {cx: across + "%", cy: top + "%", r: "4", class: "mark " + series.style};
        for (const [key, value] of Object.entries(position)) mark.setAttribute(key, value);
        return mark;
      });
      cursor.replaceChildren(line, ...marks);
      readout.textContent = chart.x + " " + step.toLocaleString("en") + chart.lines.map((series) => {
        const [x, value] = nearest(series.points, step);
        return " · " + series.name + " " + value.toLocaleString("en", {maximumSignificantDigits: 4}) + (x === step ? "" : " (at " + x.toLocaleString("en") + ")");
      }).join("");
    };
    const rest = () => { cursor.replaceChildren(); readout.replaceChildren(make("span", resting, "resting")); };
    figure.querySelector(".plot").addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      const left = 100 * (event.clientX - box.left) / box.width, far = (index) => Math.abs(lefts.get(steps[index]) - left);
      show(steps.reduce((best, _, index) => far(index) < far(best) ? index : best, 0));
    });
    figure.querySelector(".plot").addEventListener("pointerleave", rest);
    figure.addEventListener("blur", rest);
    figure.addEventListener("keydown", (event) => {
      if (!arrows[event.key]) return;
      event.preventDefault();
      show(at + arrows[event.key]);
    });
  }

  // --- surprise: the model's predictions -------------------------------------------------------------------------
  const heat = document.getElementById("heat");
  if (heat) {
    const show = surprise.explain(heat, document.getElementById("heat-note"), (index) => data.tokens[index]);
    show(data.tokens.reduce((best, token, index) => token.bits > data.tokens[best].bits ? index : best, 0));
  }

  // --- attention --------------------------------------------------------------------------------------------------
  const view = document.getElementById("attention-view");
  if (view && data.attention) {
    const {tokens, maps} = data.attention, length = tokens.length;
    const heads = maps.map(([layer, head, habit, packed]) => {
      const bytes = Uint8Array.from(atob(packed), (character) => character.charCodeAt(0));
      return {layer, head, habit, weight: (row, column) => (bytes[row * (row + 1) / 2 + column] / 255) ** 2};
    });
    const big = view.querySelector(".big canvas"), text = view.querySelector(".reading .text");
    const chosen = view.querySelector(".chosen"), top = view.querySelector(".top"), thumbs = view.querySelector(".thumbs");
    const spans = tokens.map((token, index) => {
      const span = make("span", token.replace(/^ /, "").replaceAll("\n", "↵\n") || "␣", "t");
      span.dataset.i = index;
      if (token.startsWith(" ")) text.append(" ");
      text.append(span);
      return span;
    });
    let head = data.attention.clearest, row = Math.min(length - 1, Math.max(2, Math.round(length * 0.6))), colours;
    const readColours = () => {
      const style = getComputedStyle(document.documentElement);
      const parse = (name) => style.getPropertyValue(name).trim().slice(1).match(/../g).map((pair) => parseInt(pair, 16));
      colours = {paper: parse("--raised"), ink: parse("--train"), mark: style.getPropertyValue("--val").trim()};
    };
    const mix = (share) => "rgb(" + colours.paper.map((part, index) => Math.round(part + (colours.ink[index] - part) * share)).join(" ") + ")";
    const draw = (canvas, size, which, marked) => {
      const cell = size / length, pen = canvas.getContext("2d");
      canvas.width = canvas.height = size;
      for (let y = 0; y < length; y++) for (let x = 0; x <= y; x++) {
        pen.fillStyle = mix(Math.sqrt(which.weight(y, x)));
        const left = Math.round(x * cell), upper = Math.round(y * cell);
        pen.fillRect(left, upper, Math.round((x + 1) * cell) - left, Math.round((y + 1) * cell) - upper);
      }
      if (marked === undefined) return;
      pen.strokeStyle = colours.mark;
      pen.lineWidth = 3;
      pen.strokeRect(1.5, marked * cell, Math.max((marked + 1) * cell - 1.5, 3), cell);
    };
    const buttons = [];
    const show = () => {
      const which = heads[head];
      draw(big, 960, which, row);
      spans.forEach((span, index) => {
        const weight = index <= row ? which.weight(row, index) : 0;
        span.style.background = weight ? "color-mix(in srgb, var(--val) " + Math.round(62 * Math.sqrt(weight)) + "%, transparent)" : "";
        span.style.opacity = index > row ? 0.45 : 1;
        span.classList.toggle("on", index === row);
      });
      chosen.textContent = "Layer " + which.layer + ", head " + which.head + ", reading " + quoted(tokens[row]);
      const best = [...Array(row + 1).keys()].sort((a, b) => which.weight(row, b) - which.weight(row, a)).slice(0, 4);
      top.replaceChildren(...best.map((index) => {
        const item = make("li"), bar = make("i"), distance = row - index;
        bar.style.width = 100 * which.weight(row, index) + "%";
        item.append(bar, make("span", quoted(tokens[index]) + (distance ? ", " + distance + " back" : ", itself")), make("span", (100 * which.weight(row, index)).toFixed(0) + "%"));
        return item;
      }));
      buttons.forEach((button, index) => button.setAttribute("aria-pressed", String(index === head)));
    };
    let group;
    heads.forEach((which, index) => {
      if (!group || group.dataset.layer !== String(which.layer)) {
        group = make("div", undefined, "layer");
        group.dataset.layer = which.layer;
        group.append(make("p", "Layer " + which.layer));
        thumbs.append(group);
      }
      const button = make("button"), canvas = make("canvas");
      button.type = "button";
      button.append(canvas, make("span", which.head + " · " + which.habit));
      button.setAttribute("aria-label", "Layer " + which.layer + ", head " + which.head + ": " + which.habit);
      button.addEventListener("click", () => { head = index; show(); });
      buttons.push(button);
      group.append(button);
    });
    const drawAll = () => {
      readColours();
      heads.forEach((which, index) => draw(buttons[index].querySelector("canvas"), 144, which));
      show();
    };
    const choose = (index) => { row = clamp(index, 0, length - 1); show(); };
    big.addEventListener("pointermove", (event) => {
      const box = big.getBoundingClientRect();
      choose(Math.floor((event.clientY - box.top) / box.height * length));
    });
    big.addEventListener("keydown", (event) => {
      if (!arrows[event.key]) return;
      event.preventDefault();
      choose(row + arrows[event.key]);
    });
    for (const kind of ["pointerover", "click"]) text.addEventListener(kind, (event) => { if (event.target.dataset.i) choose(Number(event.target.dataset.i)); });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
    drawAll();
  }
})();
