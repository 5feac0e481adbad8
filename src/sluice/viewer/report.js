// Shows the samples of the run. All texts of samples are untrusted: they reach the page as text nodes only.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const chosen = { step: data.steps.length - 1, group: 0, sample: 0, mode: "probability", withPrompt: false };

function node(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children); // strings become text nodes
  return made;
}

// Columns of a sample are lists over its tokens, one value when all are the same, or null when there are none.
const at = (column, t) => (Array.isArray(column) ? column[t] : column);
const number = (value, digits = 4) =>
  value === null || value === undefined ? "–" : Number(value.toPrecision(digits)).toString();
const plain = (value) => (typeof value === "string" ? value : JSON.stringify(value));
const mix = (colour, share) =>
  `color-mix(in srgb, var(${colour}) ${(100 * Math.min(1, Math.max(0, share))).toFixed(1)}%, transparent)`;

// What tokens can be coloured by. `value` is null where there is none; `scale` is what `colour` may need of the step.
const SURPRISE = 6; // nats at which the colour is full
const MODES = {
  probability: {
    value: (s, t) => (s.logprobs === null ? null : Math.exp(at(s.logprobs, t))),
    colour: (p) => mix("--hot", (-Math.log(p) / SURPRISE) * 0.85),
    scale: () => null,
    stops: () => [1, 0.5, 0.1, 0.02, 0.002],
    text: (p) => (p === 0.002 ? "≤ 0.002" : number(p)),
    unit: "probability by the engine",
  },
  ratio: {
    value: (s, t) => at(s.ratios, t),
    colour: (r, scale) => signed(Math.log(r) / scale, "--up", "--down"),
    scale: (samples) => Math.min(Math.log(2), Math.max(1e-3, largest(samples, "ratios", (r) => Math.abs(Math.log(r))))),
    stops: (scale) => [-1, -0.5, 0, 0.5, 1].map((x) => Math.exp(x * scale)),
    text: (r) => number(r, 3),
    unit: "ratio to the old policy",
  },
  advantage: {
    value: (s, t) => at(s.advantages, t),
    colour: (a, scale) => signed(a / scale, "--good", "--bad"),
    scale: (samples) => Math.max(1e-9, largest(samples, "advantages", Math.abs)),
    stops: (scale) => [-1, -0.5, 0, 0.5, 1].map((x) => x * scale),
    text: (a) => number(a, 3),
    unit: "advantage",
  },
  clipped: {
    value: (s, t) => (s.clipped === null ? null : Number(at(s.clipped, t))),
    colour: (c) => mix("--bad", c * 0.6),
    scale: () => null,
    stops: () => [0, 1],
    text: (c) => (c ? "clipped" : "not"),
    unit: "the bound changed the gradient",
  },
};

function signed(x, above, below) {
  return mix(x >= 0 ? above : below, Math.abs(x) * 0.7);
}

function largest(samples, name, size) {
  let most = 0;
  for (const sample of samples)
    for (let t = 0; t < sample.token_ids.length; t++) {
      const value = at(sample[name], t);
      if (value !== null && at(sample.policy_versions, t) >= 0) most = Math.max(most, size(value));
    }
  return most;
}

const step = () => data.steps[chosen.step];
const group = () => step().groups[chosen.group];
const sample = () => group().samples[chosen.sample];

// The list of groups

function showGroups() {
  $("step").value = chosen.step;
  $("step-number").textContent = step().step;
  const rewards = step().groups.flatMap((g) => g.samples.map((s) => s.reward)).filter((r) => r !== null);
  const [low, high] = [Math.min(0, ...rewards), Math.max(...rewards, 1e-9)];
  $("groups").replaceChildren(
    ...step().groups.map((g, i) => {
      const scored = g.samples.filter((s) => s.reward !== null);
      const mean = scored.reduce((sum, s) => sum + s.reward, 0) / scored.length;
      const bars = g.samples.map((s) => {
        const bar = node("i", s.reward === null ? "none" : "");
        bar.style.height = `${s.reward === null ? 100 : (100 * (s.reward - low)) / (high - low)}%`;
        return bar;
      });
      const button = node(
        "button",
        "group",
        node("span", "text", plain(g.messages.at(-1)?.content ?? "")),
        node("span", "sub", node("span", "", g.prompt_id), node("span", "", scored.length ? `mean ${number(mean, 3)}` : "no score")),
        node("span", "bars", ...bars),
      );
      if (g.rejected) button.append(node("span", "sub", `not trained on: ${g.rejected}`));
      button.setAttribute("aria-pressed", i === chosen.group);
      button.addEventListener("click", () => choose({ group: i, sample: 0 }));
      return button;
    }),
  );
}

// One group

function facts(pairs) {
  const known = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return node("div", "facts", ...known.map(([name, value]) => node("span", "", node("span", "name", name), plain(value))));
}

function showPrompt() {
  const g = group();
  const messages = g.messages.flatMap((message) => [
    node("div", "role", plain(message.role ?? "message")),
    node("div", "content", plain(message.content ?? message)),
  ]);
  const metadata = Object.entries(g.metadata ?? {});
  $("prompt").replaceChildren(...messages, facts([["reference", g.reference], ["row", g.where], ...metadata]));
  $("chips").replaceChildren(
    ...g.samples.map((s, i) => {
      const chip = node("button", "chip", node("span", "name", `#${s.index}`), s.reward === null ? s.outcome : number(s.reward));
      chip.setAttribute("aria-pressed", i === chosen.sample);
      chip.addEventListener("click", () => choose({ sample: i }));
      return chip;
    }),
  );
}

// One sample

function versions(s) {
  const written = s.token_ids.map((_, t) => at(s.policy_versions, t)).filter((version) => version >= 0);
  if (!written.length) return null;
  const [oldest, newest] = [Math.min(...written), Math.max(...written)];
  return oldest === newest ? String(oldest) : `${oldest} to ${newest}`;
}

function showAbout() {
  const s = sample();
  const parts = Object.entries(s.reward_parts).map(([name, value]) => [name, number(value)]);
  $("about").replaceChildren(
    facts([
      ["reward", s.reward === null ? null : number(s.reward)],
      ...(parts.length > 1 || parts[0]?.[1] !== number(s.reward) ? parts : []),
      ["outcome", s.outcome],
      ["finish", s.finish_reason],
      ["environment", s.stop_reason === s.finish_reason ? "" : s.stop_reason],
      ["tokens", s.num_tokens],
      ["temperature", s.temperature],
      ["weights of step", versions(s)],
      ["update of the step", s.trained ? s.update + 1 : null],
    ]),
  );
  const warnings = [s.error, group().rejected && `The group was not trained on: ${group().rejected}`].filter(Boolean);
  $("about").append(...warnings.map((text) => node("p", "warning", text)));
}

// Signs for characters that would not be seen, or that would change how others are shown.
const UNSEEN = /[\u0000-\u0020\u007f-\u00a0\u00ad\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufeff]/u;
const SIGNS = { " ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍" };

function visible(text) {
  if (text === "") return [node("span", "mark", "∅")];
  return [...text].flatMap((c) => {
    if (!UNSEEN.test(c)) return [c];
    const sign = SIGNS[c] ?? `⟨${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
    return [node("span", "mark", sign), ...(c === "\n" ? ["\n"] : [])];
  });
}

function showTokens() {
  const s = sample();
  const missing = (mode) => s[{ ratio: "ratios", advantage: "advantages", clipped: "clipped", probability: "logprobs" }[mode]] === null;
  for (const input of document.getElementsByName("mode")) {
    input.disabled = missing(input.value);
    input.checked = input.value === chosen.mode;
  }
  const mode = MODES[chosen.mode];
  const scale = mode.scale(step().groups.flatMap((g) => g.samples));
  const prompt = chosen.withPrompt ? data.prompts[s.prompt].map((id) => node("span", "token other", ...visible(data.pieces[id]))) : [];
  const written = s.token_ids.map((id, t) => {
    const own = at(s.policy_versions, t) >= 0;
    const token = node("span", own ? "token" : "token other", ...visible(data.pieces[id]));
    const value = own ? mode.value(s, t) : null;
    if (value !== null) token.style.backgroundColor = mode.colour(value, scale);
    token.dataset.t = t;
    return token;
  });
  $("tokens").replaceChildren(...prompt, ...written);
  if (!written.length) $("tokens").append(node("span", "mark", "no tokens"));
  $("cut").textContent = s.token_ids.length < s.num_tokens ? `The first ${s.token_ids.length} of ${s.num_tokens} tokens; all are in the ledger.` : "";
  showScale(mode, scale, missing(chosen.mode));
}

function showScale(mode, scale, missing) {
  if (missing) return $("scale").replaceChildren(`no ${chosen.mode}: the sample was not trained on`);
  const ramp = mode.stops(scale).map((value) => {
    const stop = node("span", "", mode.text(value));
    stop.style.backgroundColor = mode.colour(value, scale);
    return stop;
  });
  $("scale").replaceChildren(mode.unit, node("span", "ramp", ...ramp), node("span", "other-key", "not by the policy"));
}

// The tooltip

function showTip(token) {
  const s = sample();
  const t = Number(token.dataset.t);
  const own = at(s.policy_versions, t) >= 0;
  const value = (column) => (column === null ? null : at(column, t));
  const logprob = own ? value(s.logprobs) : null;
  const clipped = own ? value(s.clipped) : null;
  const rows = [
    ["id", s.token_ids[t]],
    ["position in response", t],
    ["probability (engine)", logprob === null ? "–" : number(Math.exp(logprob))],
    ["log-prob (engine)", number(logprob, 5)],
    ["log-prob (old)", number(own ? value(s.old_logprobs) : null, 5)],
    ["log-prob (at update)", number(own ? value(s.current_logprobs) : null, 5)],
    ["ratio", number(own ? value(s.ratios) : null, 5)],
    ["advantage", number(own ? value(s.advantages) : null)],
    ["clipped", clipped === null ? "–" : clipped ? "yes" : "no"],
    ["loss weight", number(value(s.loss_weights))],
    ["policy version", own ? at(s.policy_versions, t) : "not by the policy"],
  ];
  const table = node("table", "", ...rows.map(([name, text]) => node("tr", "", node("td", "", name), node("td", "", String(text)))));
  $("tip").replaceChildren(node("div", "text", JSON.stringify(data.pieces[s.token_ids[t]])), table);
  $("tip").hidden = false;
  const [box, tip] = [token.getClientRects()[0], $("tip").getBoundingClientRect()];
  const below = box.bottom + 8 + tip.height < innerHeight;
  $("tip").style.top = `${below ? box.bottom + 8 : Math.max(4, box.top - tip.height - 8)}px`;
  $("tip").style.left = `${Math.max(4, Math.min(box.left, innerWidth - tip.width - 8))}px`;
}

// Choices

function choose(change) {
  const focused = document.activeElement.matches(".group, .chip") && document.activeElement.className;
  Object.assign(chosen, change);
  $("tip").hidden = true;
  showGroups();
  showPrompt();
  showAbout();
  showTokens();
  if (focused) document.querySelector(`.${focused}[aria-pressed="true"]`).focus(); // the button pressed was made anew
}

function turnTo(stepIndex) {
  choose({ step: Math.min(data.steps.length - 1, Math.max(0, stepIndex)), group: 0, sample: 0 });
}

function showPage() {
  const samples = location.hash === "#samples" && data.steps.length > 0;
  $("run-page").hidden = samples;
  if ($("samples-page")) $("samples-page").hidden = !samples;
  for (const link of document.querySelectorAll("nav a"))
    if ((link.hash === "#samples") === samples) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  scrollTo(0, 0);
}

addEventListener("hashchange", showPage);
showPage();
if (data.steps.length) {
  $("step").addEventListener("input", () => turnTo(Number($("step").value)));
  $("step-before").addEventListener("click", () => turnTo(chosen.step - 1));
  $("step-after").addEventListener("click", () => turnTo(chosen.step + 1));
  $("modes").addEventListener("change", (event) => choose({ mode: event.target.value }));
  $("with-prompt").addEventListener("change", (event) => choose({ withPrompt: event.target.checked }));
  $("tokens").addEventListener("pointerover", (event) => {
    const token = event.target.closest(".token[data-t]");
    if (token) showTip(token);
    else $("tip").hidden = true;
  });
  $("tokens").addEventListener("pointerleave", () => ($("tip").hidden = true));
  turnTo(data.steps.length - 1);
}
