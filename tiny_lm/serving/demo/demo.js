const sheet = element.querySelector(".sheet"), find = (name) => sheet.querySelector(name);
const story = find(".story"), text = find(".tokens"), note = find(".note"), resting = note.innerHTML;
let number = 0, tokens = [], told;

const begin = (view) => {
  number = view.story;
  sheet.dataset.story = number;
  tokens = [];
  told = document.createTextNode("");
  const beginning = () => surprise.make("b", view.prompt);
  find(".model").textContent = view.model;
  story.replaceChildren(beginning(), told);
  text.replaceChildren(beginning());
  note.innerHTML = resting;
};

const add = (token, index) => {
  const span = surprise.make("span", token.text.replace(/^ /, "").replaceAll("\n", "↵\n") || "␣", "t h" + token.level);
  span.dataset.i = index;
  if (token.text.startsWith(" ")) text.append(" ");
  text.append(span);
};

const show = () => {
  const view = props.value;
  sheet.dataset.state = view.state;
  if (view.state === "none") return;
  if (view.story !== number) begin(view);
  told.data = view.text;
  view.tokens.slice(tokens.length).forEach((token, place) => add(token, tokens.length + place));
  tokens = view.tokens;
  find(".facts").textContent = view.facts;
};

surprise.explain(text, note, (index) => tokens[index]);
watch("value", show);
show();
