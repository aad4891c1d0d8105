import { useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { EXAMPLES } from "../examples";
import { inForce } from "../replies";
import { model, narrow, panel, path, set, setSampling, settings } from "../state";
import { BUILTIN, declared } from "../tools";
import type { Sampling, ToolSettings } from "../types";
import { language, t, type Word } from "../words";
import { pretty } from "./Calls";
import { Dialog } from "./Dialog";
import { IconButton } from "./Icon";

export function Panel() {
  const close = () => (panel.value = false);
  if (narrow.value)
    return (
      <Dialog title={t("settings")} onClose={close} class="sheet">
        <Sections />
      </Dialog>
    );
  return (
    <aside class="panel" aria-label={t("settings")}>
      <header class="dialog-head">
        <h2>{t("settings")}</h2>
        <IconButton icon="close" label={t("close")} onClick={close} />
      </header>
      <Sections />
    </aside>
  );
}

function Sections() {
  return (
    <>
      <System />
      <SamplingControls />
      <ToolsSection />
    </>
  );
}

// ---------------------------------------------------------------------------------------------------------- system

function System() {
  const field = useRef<HTMLTextAreaElement>(null);
  const chosen = settings.value.system;
  const imported = path.value.find((one) => one.role === "system")?.content; // in force until something is chosen
  useEffect(() => {
    if (document.activeElement !== field.current) field.current!.value = chosen ?? "";
  }, [chosen]);
  return (
    <section>
      <h3><label for="system">{t("system")}</label></h3>
      <p class="hint" id="system-hint">{t("systemHint")}</p>
      <textarea
        id="system"
        ref={field}
        rows={5}
        aria-describedby="system-hint"
        placeholder={chosen === undefined ? (imported ?? model.value?.default_system ?? "") : ""}
        onInput={(event) => set({ system: event.currentTarget.value })}
      />
      <div class="chips" role="group" aria-label={t("examples")}>
        {EXAMPLES.map((one) => (
          <button
            key={one.kind}
            type="button"
            onClick={() => {
              field.current!.value = one.system[language.value];
              set({ system: one.system[language.value] });
            }}
          >
            {t(one.kind)}
          </button>
        ))}
        {chosen !== undefined && (
          <button
            type="button"
            class="link"
            onClick={() => {
              field.current!.value = "";
              set({ system: undefined });
            }}
          >
            {t("systemOwn")}
          </button>
        )}
      </div>
    </section>
  );
}

// ---------------------------------------------------------------------------------------------------------- sampling

interface Control {
  name: keyof Sampling;
  low: number;
  high: number;
  step: number;
}

const SLIDERS: Control[] = [
  { name: "temperature", low: 0, high: 2, step: 0.05 },
  { name: "top_p", low: 0.05, high: 1, step: 0.05 },
  { name: "top_k", low: 0, high: 200, step: 1 },
  { name: "min_p", low: 0, high: 1, step: 0.01 },
  { name: "repetition_penalty", low: 0.5, high: 2, step: 0.05 },
  { name: "presence_penalty", low: -2, high: 2, step: 0.1 },
  { name: "frequency_penalty", low: -2, high: 2, step: 0.1 },
];

function SamplingControls() {
  const chosen = settings.value.sampling ?? {};
  const force = inForce(chosen);
  return (
    <section>
      <h3>{t("sampling")}</h3>
      <p class="hint">{t("samplingHint")}</p>
      {SLIDERS.map((one) => (
        <Slider key={one.name} control={one} value={force[one.name] ?? 0} own={chosen[one.name] === undefined} />
      ))}
      <Whole name="max_new_tokens" empty={force.max_new_tokens === undefined ? t("asRoom") : String(force.max_new_tokens)} low={1} />
      <Whole name="seed" empty={t("random")} low={0} />
    </section>
  );
}

function Slider({ control, value, own }: { control: Control; value: number; own: boolean }) {
  const { name, low, high, step } = control;
  const label = t(name as Word);
  const given = (text: string) => {
    const number = Number(text);
    if (text.trim() !== "" && Number.isFinite(number)) setSampling(name, Math.min(Math.max(number, low), high));
  };
  return (
    <div class={`control ${own ? "own" : ""}`}>
      <label for={name}>{label}</label>
      <input
        class="number"
        type="number"
        aria-label={label}
        min={low}
        max={high}
        step={step}
        value={Number(value.toFixed(4))}
        onChange={(event) => given(event.currentTarget.value)}
      />
      <Reset name={name} own={own} label={label} />
      <input
        id={name}
        type="range"
        min={low}
        max={high}
        step={step}
        value={value}
        aria-describedby={`${name}-hint`}
        onInput={(event) => given(event.currentTarget.value)}
      />
      <small id={`${name}-hint`}>{t(`${name}Hint` as Word)}</small>
    </div>
  );
}

function Whole({ name, empty, low }: { name: "max_new_tokens" | "seed"; empty: string; low: number }) {
  const chosen = settings.value.sampling?.[name];
  return (
    <div class={`control ${chosen === undefined ? "own" : ""}`}>
      <label for={name}>{t(name)}</label>
      <input
        id={name}
        class="number"
        type="number"
        min={low}
        step={1}
        placeholder={empty}
        value={chosen ?? ""}
        aria-describedby={`${name}-hint`}
        onChange={(event) => {
          const text = event.currentTarget.value.trim();
          const number = Math.floor(Number(text));
          setSampling(name, text === "" || !Number.isFinite(number) ? undefined : Math.max(number, low));
        }}
      />
      <Reset name={name} own={chosen === undefined} label={t(name)} />
      <small id={`${name}-hint`}>{t(`${name}Hint`)}</small>
    </div>
  );
}

function Reset({ name, own, label }: { name: keyof Sampling; own: boolean; label: string }) {
  return <IconButton icon="again" class="reset" label={`${t("reset")}: ${label}`} disabled={own} onClick={() => setSampling(name, undefined)} />;
}

// ---------------------------------------------------------------------------------------------------------- tools

function ToolsSection() {
  const chosen = settings.value.tools ?? {};
  const bad = useSignal("");
  const change = (what: Partial<ToolSettings>) => set({ tools: { ...settings.value.tools, ...what } });
  const check = (text: string) => {
    try {
      declared(text);
      bad.value = "";
    } catch (problem) {
      bad.value = t("badTools", { why: problem instanceof Error ? problem.message : "" });
    }
  };
  return (
    <section>
      <h3>{t("tools")}</h3>
      <p class="hint">{t("toolsHint")}</p>
      {Object.keys(BUILTIN).map((name) => (
        <label key={name} class="check">
          <input
            type="checkbox"
            checked={chosen.builtin?.includes(name) ?? false}
            onChange={(event) => {
              const others = (chosen.builtin ?? []).filter((one) => one !== name);
              change({ builtin: event.currentTarget.checked ? [...others, name] : others });
            }}
          />
          {t(name as Word)}
        </label>
      ))}
      <label class="check">
        <input type="checkbox" checked={chosen.required ?? false} onChange={(event) => change({ required: event.currentTarget.checked })} />
        {t("required")}
      </label>
      <p class="hint" id="declared-hint">{t("declared")}</p>
      <textarea
        class="code-field"
        rows={4}
        spellcheck={false}
        aria-label={t("tools")}
        aria-describedby="declared-hint"
        aria-invalid={bad.value !== ""}
        placeholder='[{"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]'
        defaultValue={chosen.declared ?? ""}
        onInput={(event) => {
          check(event.currentTarget.value);
          change({ declared: event.currentTarget.value });
        }}
      />
      {bad.value && <p class="bad" role="alert">{bad.value}</p>}
      <h4>{t("calls")}</h4>
      <CallList />
    </section>
  );
}

function CallList() {
  const results = new Map(path.value.filter((one) => one.role === "tool").map((one) => [one.extra.tool_call_id, one.content]));
  const calls = path.value.flatMap((one) => one.extra.tool_calls ?? []);
  if (!calls.length) return <p class="hint">{t("noCalls")}</p>;
  return (
    <ol class="call-list">
      {calls.map((one) => (
        <li key={one.id}>
          <code>
            {one.function.name}({pretty(one.function.arguments)})
          </code>
          {results.has(one.id) && <code>→ {results.get(one.id)}</code>}
        </li>
      ))}
    </ol>
  );
}
