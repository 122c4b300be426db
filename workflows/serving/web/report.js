// A cartridge's report card as a table: arms down, metrics across, each with its 95 % interval.

import { h } from "preact";
import htm from "htm";

const html = htm.bind(h);

const METRICS = [
  ["contains", "answer found", true],
  ["choice_accuracy", "right of four", true],
  ["f1", "F1", true],
  ["nll_per_token", "NLL a token", false],
];

export const bytes = (count) => {
  if (count === null || count === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let step = 0;
  while (count >= 1024 && step < units.length - 1) { count /= 1024; step += 1; }
  return `${count.toFixed(step && count < 100 ? 1 : 0)} ${units[step]}`;
};

const figure = ({ mean, low, high }, share) => {
  const show = (value) => (share ? `${Math.round(value * 100)} %` : value.toFixed(2));
  return html`${show(mean)} <small>${show(low)} to ${show(high)}</small>`;
};

export function ReportCard({ cartridge }) {
  const card = cartridge.report_card;
  if (!card) return html`<p>${cartridge.id} has no report card; <code>cartridges evaluate</code> makes one.</p>`;
  const arms = Object.entries(card.arms ?? {});
  const shown = METRICS.filter(([metric]) => arms.some(([, arm]) => arm.metrics?.[metric]));
  return html`
    <dl class="facts">
      <div><dt>corpus</dt><dd>${card.corpus.tokens.toLocaleString()} tokens</dd></div>
      <div><dt>cartridge</dt><dd>${cartridge.num_tokens} tokens</dd></div>
      <div><dt>smaller</dt><dd>${card.cartridge.compression_ratio.toFixed(1)} times</dd></div>
      <div><dt>questions</dt><dd>${card.questions?.asked ?? "–"}
        ${card.questions?.source === "held_out_self_study" ? " (its own, held out)" : ""}</dd></div>
      <div><dt>version</dt><dd><code>${cartridge.version}</code></dd></div>
    </dl>
    <div class="scroll"><table>
      <caption>With 95 % intervals over the questions</caption>
      <thead><tr><th scope="col">arm</th>${shown.map(([, label]) => html`<th scope="col">${label}</th>`)}
        <th scope="col">KV</th></tr></thead>
      <tbody>${arms.map(([name, arm]) => html`<tr class=${name === "cartridge" ? "own" : ""}>
        <th scope="row">${name.replaceAll("_", " ")}</th>
        ${shown.map(([metric, , share]) => html`<td>${arm.metrics[metric] ? figure(arm.metrics[metric], share) : "–"}</td>`)}
        <td>${bytes(arm.kv_bytes)}</td></tr>`)}</tbody>
    </table></div>
    ${(card.notes ?? []).map((note) => html`<p class="note">${note}</p>`)}`;
}
