import { useSignal } from "@preact/signals";
import { answerCall, busy, runCall } from "../replies";
import { BUILTIN } from "../tools";
import type { Message, ToolCall } from "../types";
import { t } from "../words";
import { Icon } from "./Icon";

interface Props {
  message: Message;
  calls: ToolCall[];
  results: ReadonlyMap<string, string>;
  /** The conversation waits here. */
  open: boolean;
}

/** What a reply asked for, and what came back. */
export function Calls({ message, calls, results, open }: Props) {
  return (
    <div class="calls">
      {calls.map((one) => (
        <section key={one.id} class="call" aria-label={t("call", { name: one.function.name })}>
          <div class="call-head">
            <Icon name="tool" />
            <strong>{one.function.name}</strong>
          </div>
          <Given label={t("arguments")} text={pretty(one.function.arguments)} />
          {results.has(one.id) ? (
            <Given label={t("result")} text={results.get(one.id)!} />
          ) : (
            open && <Answer message={message} one={one} />
          )}
        </section>
      ))}
    </div>
  );
}

export function Given({ label, text }: { label: string; text: string }) {
  return (
    <div class="given">
      <span class="given-label">{label}</span>
      <pre tabIndex={0}>{text}</pre>
    </div>
  );
}

export function pretty(text: string): string {
  try {
    return JSON.stringify(JSON.parse(text), null, 1).replace(/\n\s*/g, " ");
  } catch {
    return text;
  }
}

function Answer({ message, one }: { message: Message; one: ToolCall }) {
  const text = useSignal("");
  if (Object.hasOwn(BUILTIN, one.function.name))
    return (
      <button type="button" class="primary" disabled={busy.value} onClick={() => runCall(message, one)}>
        {t("run")}
      </button>
    );
  return (
    <form
      class="answer"
      onSubmit={(event) => {
        event.preventDefault();
        void answerCall(message, one, text.value);
      }}
    >
      <textarea rows={2} aria-label={t("result")} placeholder={t("result")} onInput={(event) => (text.value = event.currentTarget.value)} />
      <button type="submit" class="primary" disabled={busy.value}>
        {t("sendResult")}
      </button>
    </form>
  );
}
