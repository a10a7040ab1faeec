// Answers requests, one JSON object a line, with the transformers.js and onnxruntime-web that are installed in a folder.
//
//     node transformersjs.cjs MODULES    MODULES: where `npm install @huggingface/transformers` was run

const { createRequire } = require("node:module");
const path = require("node:path");
const readline = require("node:readline");

const installed = createRequire(path.join(path.resolve(process.argv[2]), "here"));
const { env, AutoModelForCausalLM, AutoTokenizer, Tensor } = installed("@huggingface/transformers");
// Not onnxruntime-node, which the above runs on: what a browser runs it on.
const web = createRequire(installed.resolve("@huggingface/transformers"))("onnxruntime-web");

env.allowRemoteModels = false;
let tokenizer, model;

const integers = (ids) => BigInt64Array.from(ids, BigInt);
const inputs = (ids, Class) => ({
  input_ids: new Class("int64", integers(ids), [1, ids.length]),
  attention_mask: new Class("int64", integers(ids.map(() => 1)), [1, ids.length]),
});

const answers = {
  async load({ folder, dtype }) {
    env.localModelPath = path.dirname(folder);
    tokenizer = await AutoTokenizer.from_pretrained(path.basename(folder));
    model = await AutoModelForCausalLM.from_pretrained(path.basename(folder), { dtype });
    return `transformers.js ${env.version}`;
  },
  encode: async ({ text, begin }) => tokenizer.encode(text, { add_special_tokens: begin }),
  logits: async ({ ids }) => Array.from((await model(inputs(ids, Tensor))).logits.data),
  async generate({ ids, count }) {
    const made = await model.generate({ ...inputs(ids, Tensor), max_new_tokens: count, do_sample: false });
    return made.tolist()[0].slice(ids.length).map(Number);
  },
  async browser({ file, ids }) {
    const session = await web.InferenceSession.create(file, { executionProviders: ["wasm"] });
    const feeds = inputs(ids, web.Tensor);
    for (const { name, shape } of session.inputMetadata) {
      if (name.startsWith("past_")) feeds[name] = new web.Tensor("float32", [], [1, shape[1], 0, shape[3]]);
    }
    return Array.from((await session.run(feeds)).logits.data);
  },
};

(async () => {
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const { action, ...values } = JSON.parse(line);
    try {
      console.log(JSON.stringify({ result: await answers[action](values) }));
    } catch (error) {
      console.log(JSON.stringify({ error: String(error.stack ?? error) }));
    }
  }
})();
