const sheet = element.querySelector(".sheet"), find = (name) => sheet.querySelector(name);
const story = find(".story"), text = find(".tokens"), note = find(".note"), resting = note.innerHTML;
let number = 0, tokens = [], completion;

const reset = (view) => {
  number = view.story;
  sheet.dataset.story = number;
  tokens = [];
  completion = document.createTextNode("");
  const prompt = () => surprise.make("b", view.prompt);
  find(".model").textContent = view.model;
  story.replaceChildren(prompt(), completion);
  text.replaceChildren(prompt());
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
  if (view.story !== number) reset(view);
  completion.data = view.text;
  view.tokens.slice(tokens.length).forEach((token, index) => add(token, tokens.length + index));
  tokens = view.tokens;
  find(".facts").textContent = view.facts;
};

surprise.explain(text, note, (index) => tokens[index]);
watch("value", show);
show();
