/* The search of the site. smalldocs draws the box and calls `new Fuse(entries).search(question)`; this stands in Fuse's place.

   An entry is a section of a page: href, title (of the page), section, text. A page is found by its words: in its title, its
   headings, its first text, its body, each weighted by how rare the word is on the site (BM25). Words that people use for
   something else in the field stand under SYNONYMS. Pages for readers rank over pages of code, and those over lists. */
(() => {
  "use strict";
  const STOP = new Set(("a an and get getting are as at be by can do does for from have how i if in into is it its me my not of on or should so that the there "
    + "this to use using used want was what when where which who why will with work works you your get need much many mean means").split(" "));
  const SYNONYMS = {  // what is typed: what the pages say
    own: "own", dataset: "data rows", datasets: "data rows", csv: "files rows", jsonl: "files rows", corpus: "text passages", book: "muse text",
    lora: "adapter", peft: "adapter", qlora: "adapter", adapters: "adapter",
    oom: "memory fit", vram: "memory fit", ram: "memory", fit: "memory fit",
    gpu: "gpus", gpus: "processes scale", multigpu: "gpus scale", multi: "several", two: "several", distributed: "processes gpus", cluster: "gpus scale",
    zero: "zero deepspeed", zero3: "zero deepspeed", fsdp: "deepspeed sharded", torchrun: "launching processes", accelerate: "launching processes",
    install: "commands", quickstart: "first run", start: "first run", started: "first run", begin: "first run", tutorial: "first run", laptop: "laptop embedded",
    llm: "model", checkpoint: "checkpoints saved", resume: "checkpoints", crash: "checkpoints", interrupted: "checkpoints", restart: "checkpoints",
    mia: "membership", privacy: "privleak membership", minkpp: "membership", leak: "privleak",
    fq: "forget quality", mu: "model utility", ks: "forget quality", kolmogorov: "forget quality", pvalue: "forget quality", "p-value": "forget quality",
    hyperparameter: "tune settings", hyperparameters: "tune settings", hyperparams: "tune settings", sweep: "sweeps tune", lr: "learning rate", grid: "grid",
    random: "seeds", variance: "seeds repetitions", noise: "seeds repetitions", seed: "seeds", reproduce: "same reproduction", reproducible: "same processor",
    deterministic: "same processor", time: "long hours", slow: "fast speed", faster: "fast speed", speed: "fast", duration: "long", disk: "disk",
    relearn: "robustness relearning attack", relearning: "robustness", jailbreak: "attacks robustness", quantization: "robustness attack", quantize: "robustness attack",
    broken: "gibberish divergence", nonsense: "gibberish divergence", nan: "divergence", diverged: "divergence", collapse: "gibberish divergence",
    compare: "compared", best: "leaderboard compared", ranking: "leaderboard", sota: "leaderboard", benchmark: "benchmark", cli: "command line",
    command: "commands", flags: "options", arguments: "options arguments", yaml: "settings", config: "configuration", trl: "trainer", huggingface: "hub",
    python: "python trainer", api: "api index", functions: "api index", write: "add declare", custom: "own add", new: "add extend", implement: "add declare",
    loss: "losses", losses: "loss", metric: "metrics", plot: "plots", figure: "plots", chart: "plots", export: "reports", share: "reports", colleague: "reports",
    upload: "hub cards", publish: "hub cards", offline: "embedded laptop", cpu: "laptop embedded", mac: "laptop embedded", colab: "laptop first run",
    verbatim: "memorization muse", memorize: "memorization", memorised: "memorization", copyright: "muse text", gdpr: "own data asks forgotten", delete: "forget own data",
    hazardous: "wmdp", bio: "wmdp", cyber: "wmdp", mmlu: "general ability", lmeval: "general ability", capability: "general ability utility",
    harness: "general ability", retain: "retain", reference: "reference retain", gold: "retain", baseline: "finetuned retain",
    early: "stop callback evaluate", stop: "stop callback evaluate", stopping: "callback evaluate while training", callback: "evaluate training", logs: "retain logs records", trust: "checked verifying",
    template: "prompts", chat: "prompts", system: "prompts", tokenizer: "tokenizers", pretrained: "smollm2 pretrained", paraphrase: "truth ratio", dpo: "idkdpo preference",
    refusal: "idkdpo", know: "know", error: "errors checked", llama: "llama", "8b": "llama memory",
  };
  const ROOMS = { tutorials: 1.7, "reference/methods": 1.35, "reference/metrics": 1.35, results: 1.1, "index.html": 1, internals: 0.6, commands: 0.85 };
  const PHRASES = [[/out[ -]of[ -]memory/g, "oom"], [/min-?k(%|\b)\S*/g, "mia"], [/p[ -]values?\b/g, "p-value"], [/own models?/g, "measure loading model"], [/my own/g, "own"], [/open ?unlearning/g, "published"],
    [/own data(set)?s?/g, "own data files rows asks forgotten"], [/custom (metric|method|loss|benchmark|attack)s?/g, "extend add $1"], [/zero-?3/g, "zero3"], [/hugging face/g, "hub"], [/learning rate/g, "lr"], [/from scratch/g, "pretrained"], [/fine-?tun\w*/g, "finetuned"], [/general[- ]ability/g, "lmeval"]];

  const stem = (w) => w.length > 4 ? w.replace(/(ies)$/, "y").replace(/(?:ing|ed|es|s)$/, "").replace(/e$/, "") : w.replace(/([^s])s$/, "$1");
  const words = (text) => text.toLowerCase().replace(/’/g, "'").match(/[a-z0-9][a-z0-9_+-]*/g) || [];
  const stems = (text) => words(text).flatMap((w) => /[_-]/.test(w) ? [w, ...w.split(/[_-]/)] : [w]).filter((w) => w && !STOP.has(w)).map(stem);
  const counts = (list) => { const c = new Map(); list.forEach((w) => c.set(w, (c.get(w) || 0) + 1)); return c; };

  const asked = (question) => {  // stem: weight
    let q = question.toLowerCase();
    PHRASES.forEach(([from, to]) => { q = q.replace(from, to); });
    const found = new Map();
    const add = (w, weight) => found.set(w, Math.max(found.get(w) || 0, weight));
    words(q).forEach((w) => {
      if (STOP.has(w)) return;
      stems(w).forEach((s) => add(s, 1));
      if (Object.hasOwn(SYNONYMS, w)) stems(SYNONYMS[w]).forEach((s) => add(s, 0.7));
    });
    return found;
  };

  const room = (href) => {
    const key = Object.keys(ROOMS).find((k) => href.startsWith(k));
    const list = /(^|\/)(index|api|catalogue)\.html/.test(href) && href !== "index.html" ? 0.6 : 1;
    return (key ? ROOMS[key] : 0.9) * list;
  };

  class Search {
    constructor(given) {
      const entries = given.length ? given : globalThis.siteEntries || [];
      const pages = new Map();
      entries.forEach((e) => {
        const href = e.href.split("#")[0];
        if (!pages.has(href)) pages.set(href, { href, title: e.title, sections: [], text: "" });
        const page = pages.get(href);
        page.sections.push(e);
        page.text += ` ${e.section} ${e.text}`;
      });
      this.pages = Array.from(pages.values());
      this.pages.forEach((p) => {
        const first = (p.sections[0] || { text: "" }).text.slice(0, 600);
        p.name = new Set(stems(`${p.title} ${p.title.replace(/([a-z])([A-Z])/g, "$1 $2")} ${p.href.replace(/\.html|index/g, " ").replace(/\//g, " ")}`));
        p.first = new Set(stems(first));
        p.heads = new Set(stems(p.sections.map((s) => s.section).join(" ")));
        p.body = counts(stems(p.text));
        p.size = Array.from(p.body.values()).reduce((a, b) => a + b, 0);
      });
      this.mean = this.pages.reduce((sum, p) => sum + p.size, 0) / Math.max(1, this.pages.length);
      this.df = new Map();
      this.named = new Map();  // in how many names of pages a word stands
      this.pages.forEach((p) => p.name.forEach((w) => this.named.set(w, (this.named.get(w) || 0) + 1)));
      this.pages.forEach((p) => new Set([...p.body.keys(), ...p.name]).forEach((w) => this.df.set(w, (this.df.get(w) || 0) + 1)));
    }

    rarity(w, among = this.df) { const n = among.get(w) || 0; return n ? Math.log(1 + (this.pages.length - n + 0.5) / (n + 0.5)) : 0; }

    score(page, query) {
      let sum = 0, met = 0, all = 0;
      query.forEach((weight, w) => {
        const tf = page.body.get(w) || 0;
        const near = tf * 2.2 / (tf + 1.2 * (0.4 + 0.6 * page.size / this.mean));
        const here = near + (page.first.has(w) ? 1.2 : 0) + (page.heads.has(w) ? 1.2 : 0);
        const name = page.name.has(w) ? this.rarity(w, this.named) : 0;
        sum += weight * (this.rarity(w) * here + 3 * name);
        if (weight === 1 && this.df.has(w)) { all += 1; met += here + name > 0 ? 1 : 0; }
      });
      return sum * room(page.href) * (all ? 0.5 + 0.5 * met / all : 1);
    }

    section(page, query, typed) {  // the part of a page to show: one whose heading was typed, else the best, else the top
      const exact = page.sections.find((s) => s.section.toLowerCase() === typed);
      if (exact) return [exact, true];
      let best = page.sections[0], most = 0;
      page.sections.forEach((s) => {
        const heading = new Set(stems(s.section));
        let points = 0;
        query.forEach((weight, w) => { points += heading.has(w) ? weight * this.rarity(w) : 0; });
        if (points > most) { best = s; most = points; }
      });
      return [best, false];
    }

    /* Beginnings of words count while one types: the last word stands for every word of the site that begins so. */
    completed(question) {
      const typed = words(question), last = typed[typed.length - 1] || "", query = asked(question);
      if (last.length < 3 || this.df.has(stem(last)) || Object.hasOwn(SYNONYMS, last)) return query;
      Array.from(this.df.keys()).filter((w) => w.startsWith(last)).slice(0, 8).forEach((w) => query.set(w, 0.8));
      return query;
    }

    search(question, { limit = 10 } = {}) {
      const query = this.completed(question), typed = question.trim().toLowerCase();
      return this.pages.map((page) => {
        const [item, exact] = this.section(page, query, typed);
        const title = page.title.toLowerCase() === typed;
        const code = exact && !item.href.startsWith("reference/api");
        return { item, page: page.href, score: this.score(page, query) * (title ? 3 : 1) + (code ? 60 : 0) };
      }).filter((found) => found.score > 0).sort((a, b) => b.score - a.score).slice(0, limit);
    }
  }
  globalThis.Fuse = Search;

  // A browser fetches nothing for a page that is a file; then the entries come as a script.
  if (globalThis.location?.protocol === "file:" && document.currentScript) {
    const entries = document.createElement("script");
    entries.src = document.currentScript.src.replace(/[^/]*$/, "entries.js");
    document.head.append(entries);
  }
})();
