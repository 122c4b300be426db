// The page: pick a corpus, ask, and see the cartridge beside the base model and the full context.

import { h, render } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import htm from "htm";
import { getCartridge, getKey, listCartridges, setKey, streamAnswer } from "./api.js";
import { bytes, ReportCard } from "./report.js";

const html = htm.bind(h);

// Ways to answer, in the order in which they are asked: one after the other, so that none disturbs the
// figures of another.
const WAYS = [
  { id: "cartridge", title: "Cartridge", about: "the small trained cache in place of the corpus",
    body: (name) => ({ model: name }) },
  { id: "base", title: "Base model", about: "nothing but the question", body: () => ({ model: "base" }) },
  { id: "full_context", title: "Full context", about: "the whole corpus in the prompt",
    body: (name) => ({ model: name, full_context: true }) },
];
const MAX_TOKENS = 256;

function App() {
  const [cartridges, setCartridges] = useState(null);
  const [chosen, setChosen] = useState(null);
  const [card, setCard] = useState(null);
  const [problem, setProblem] = useState(null);
  const load = async () => {
    try {
      const found = await listCartridges();
      setCartridges(found);
      setProblem(null);
      setChosen((name) => (found.some(({ id }) => id === name) ? name : found[0]?.id ?? null));
    } catch (error) { setProblem(error); }
  };
  useEffect(() => { load(); }, []);
  useEffect(() => {
    setCard(null);
    if (chosen) getCartridge(chosen).then(setCard, setProblem);
  }, [chosen]);
  return html`
    <header><h1>Cartridges</h1><p>A small KV cache, trained offline, that stands in for a corpus.</p></header>
    <main>
      ${problem && html`<p class="problem" role="alert">${problem.message}</p>`}
      ${problem?.status === 401 && html`<${KeyForm} onKey=${load} />`}
      ${cartridges?.length === 0 && html`<p>The registry is empty; <code>cartridges build</code> fills it.</p>`}
      ${cartridges?.length > 0 && html`
        <label class="pick">Corpus
          <select value=${chosen} onChange=${(event) => setChosen(event.target.value)}>
            ${cartridges.map(({ id }) => html`<option value=${id}>${id}</option>`)}
          </select></label>
        ${card?.id === chosen && html`<${Chat} key=${chosen} cartridge=${card} />
          <section aria-labelledby="card"><h2 id="card">Report card</h2><${ReportCard} cartridge=${card} /></section>`}`}
    </main>`;
}

function KeyForm({ onKey }) {
  const keep = (event) => {
    event.preventDefault();
    setKey(event.target.elements.key.value.trim());
    onKey();
  };
  return html`<form class="key" onSubmit=${keep}>
    <label>API key <input name="key" type="password" autocomplete="off" value=${getKey()} required /></label>
    <button>Use it</button> <small>kept until this tab is closed</small></form>`;
}

function Chat({ cartridge }) {
  const [turns, setTurns] = useState([]);
  const [running, setRunning] = useState(null);
  const [beside, setBeside] = useState(true);
  const input = useRef(null);
  const ways = WAYS.filter(({ id }) => id === "cartridge" || (beside && (id !== "full_context" || cartridge.full_context)));

  const ask = async (event) => {
    event.preventDefault();
    const question = input.current.value.trim();
    if (!question || running) return;
    input.current.value = "";
    const control = new AbortController();
    setRunning(control);
    const before = turns;
    const answers = {};
    const show = (id, told) => {
      answers[id] = { ...answers[id], ...told };
      setTurns([...before, { question, answers: { ...answers } }]);
    };
    for (const { id } of ways) show(id, { state: "waiting" });
    for (const way of ways) {
      if (control.signal.aborted) { show(way.id, { state: "stopped" }); continue; }
      show(way.id, { state: "asking", text: "" });
      try {
        const messages = [...history(before, way.id), { role: "user", content: question }];
        const told = await streamAnswer({ ...way.body(cartridge.id), messages, max_tokens: MAX_TOKENS },
          control.signal, (text) => show(way.id, { text }));
        show(way.id, { ...told, state: "done" });
      } catch (error) {
        show(way.id, control.signal.aborted ? { state: "stopped" } : { state: "failed", error: error.message });
      }
    }
    setRunning(null);
    input.current?.focus();
  };

  return html`<section aria-label="Chat">
    <div class="turns" aria-live="polite">${turns.map((turn) => html`<article>
      <h3>${turn.question}</h3>
      <div class="ways">${WAYS.filter(({ id }) => turn.answers[id]).map((way) =>
        html`<${Answer} way=${way} answer=${turn.answers[way.id]} />`)}</div></article>`)}</div>
    <form class="ask" onSubmit=${ask}>
      <label class="question">Question <input ref=${input} name="question" autocomplete="off"
        placeholder=${`Ask about ${cartridge.id}`} required /></label>
      ${running ? html`<button type="button" onClick=${() => running.abort()}>Stop</button>` : html`<button>Ask</button>`}
      <label class="beside"><input type="checkbox" checked=${beside} disabled=${!!running}
        onChange=${(event) => setBeside(event.target.checked)} /> the base model${
        cartridge.full_context ? " and full context" : ""} beside it</label>
    </form>
    ${!cartridge.full_context && html`<p class="note">The corpus' text is not kept here, so there is no full-context
      answer to compare with.</p>`}
  </section>`;
}

// What one way has said so far: each keeps its own conversation.
const history = (turns, id) => turns.filter(({ answers }) => answers[id]?.state === "done")
  .flatMap(({ question, answers }) => [
    { role: "user", content: question }, { role: "assistant", content: answers[id].text }]);

function Answer({ way, answer }) {
  const { state, text, context, usage } = answer;
  return html`<section class=${`way ${way.id}`} data-way=${way.id} data-state=${state}>
    <h4>${way.title} <small>${way.about}</small></h4>
    <p class="text">${text?.trimStart()}${state === "asking" && html`<span class="cursor" aria-hidden="true"></span>`}</p>
    ${state === "waiting" && html`<p class="note">waits its turn</p>`}
    ${state === "stopped" && html`<p class="note">stopped</p>`}
    ${state === "failed" && html`<p class="problem" role="alert">${answer.error}</p>`}
    ${state === "done" && html`<dl class="figures">
      <div><dt>first token</dt><dd>${seconds(answer.ttft)}</dd></div>
      <div><dt>then</dt><dd>${answer.speed === null ? "–" : `${answer.speed.toFixed(1)} tokens/s`}</dd></div>
      <div><dt>KV</dt><dd title="of the prefix and the conversation, at two bytes a value">${bytes(context?.kv_bytes)}</dd></div>
      <div><dt>prompt</dt><dd>${usage?.prompt_tokens ?? "–"} tokens</dd></div>
    </dl>`}
    ${context?.truncated && html`<p class="note">The corpus is longer than the model's window: only its beginning was read.</p>`}
  </section>`;
}

const seconds = (value) => (value === null ? "–" : value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(2)} s`);

render(html`<${App} />`, document.body);
