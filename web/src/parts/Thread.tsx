import { useSignal } from "@preact/signals";
import { useEffect, useLayoutEffect, useMemo, useRef } from "preact/hooks";
import { EXAMPLES } from "../examples";
import { again, fitAndAsk, goOn, run, startWith, type Run } from "../replies";
import { complain, model, path, say, set, sought, talk } from "../state";
import type { Message } from "../types";
import { count, language, t } from "../words";
import { Icon, IconButton } from "./Icon";
import { LiveReply, MessageRow } from "./Message";

// the newest messages are there with the first paint; the others come in while the browser has nothing else to do
const FIRST_ROWS = 24;
const MORE_ROWS = 40;
const NEAR_END = 80;
// rows that the browser takes or leaves together; a row's stretch never changes, whatever comes in before it
const STRETCH = 40;

export function Thread() {
  const scroller = useRef<HTMLDivElement>(null);
  const inner = useRef<HTMLDivElement>(null);
  const stuck = useSignal(true);
  const rows = useSignal(FIRST_ROWS);
  const shown = path.value;
  const id = talk.value?.conversation.id ?? null;
  const here = useRef<string | null>(null);
  if (here.current !== id) {
    here.current = id;
    rows.value = FIRST_ROWS;
    stuck.value = true;
  }

  const visible = useMemo(() => shown.filter((one) => one.role === "user" || one.role === "assistant"), [shown]);
  const results = useMemo(
    () => new Map(shown.filter((one) => one.role === "tool").map((one) => [one.extra.tool_call_id ?? "", one.content])),
    [shown],
  );
  const from = Math.max(visible.length - rows.value, 0);

  useEffect(() => {
    if (from === 0) return;
    const idle = window.requestIdleCallback ?? ((then: () => void) => setTimeout(then, 30));
    const cancel = window.cancelIdleCallback ?? clearTimeout;
    const waiting = idle(() => (rows.value += MORE_ROWS));
    return () => cancel(waiting as number);
  }, [from, id]);

  const toEnd = () => {
    const { current } = scroller;
    if (current) current.scrollTop = current.scrollHeight;
  };

  // the end stays in sight while the text grows, unless the reader went elsewhere
  useEffect(() => {
    const watch = new ResizeObserver(() => {
      if (stuck.value) toEnd();
    });
    watch.observe(inner.current!);
    return () => watch.disconnect();
  }, []);

  useLayoutEffect(() => {
    if (stuck.value) toEnd();
  }, [id, visible.length]);

  useEffect(() => {
    const target = sought.value;
    if (target === null) return;
    const place = visible.findIndex((one) => one.id === target);
    if (place < 0) return;
    if (place < from) {
      rows.value = visible.length - place + FIRST_ROWS;
      return;
    }
    const element = document.getElementById(target);
    if (!element) return;
    stuck.value = false;
    element.scrollIntoView({ block: "center" });
    element.classList.add("sought");
    setTimeout(() => element.classList.remove("sought"), 2000);
    sought.value = null;
  }, [sought.value, from, visible]);

  const scrolled = () => {
    const { scrollTop, scrollHeight, clientHeight } = scroller.current!;
    stuck.value = scrollHeight - scrollTop - clientHeight < NEAR_END;
  };

  const one = run.value;
  return (
    <div class="thread-frame">
      <div class="thread" ref={scroller} onScroll={scrolled} onClick={copyCode} tabIndex={0} role="region" aria-label={t("conversations")}>
        <div class="thread-inner" ref={inner}>
          {visible.length === 0 && !one && <Greeting />}
          {stretches(visible, from).map(([number, messages]) => (
            <div class="stretch" key={number}>
              {messages.map((message) => {
                const beside = talk.value?.kids.get(message.parent) ?? [];
                const live = one && one.phase.value !== "ended" && one.message.value?.id === message.id ? one : null;
                return (
                  <MessageRow
                    key={message.id}
                    message={message}
                    place={beside.indexOf(message.id)}
                    places={beside.length}
                    last={message === visible.at(-1)}
                    run={live}
                    results={results}
                  />
                );
              })}
            </div>
          ))}
          {one && one.phase.value !== "ended" && <Progress run={one} />}
          {one?.trouble.value && <TroubleCard run={one} last={visible.at(-1) ?? null} />}
        </div>
      </div>
      {!stuck.value && visible.length > 0 && (
        <IconButton icon="down" class="to-end" label={t("toEnd")} onClick={() => { stuck.value = true; toEnd(); }} />
      )}
      <Announcer />
    </div>
  );
}

/** The messages in groups, each with its number. */
function stretches(messages: Message[], from: number): [number, Message[]][] {
  const found: [number, Message[]][] = [];
  for (let at = from; at < messages.length; ) {
    const number = Math.floor(at / STRETCH);
    const end = Math.min((number + 1) * STRETCH, messages.length);
    found.push([number, messages.slice(at, end)]);
    at = end;
  }
  return found;
}

/** Before the first word: what the server is doing. */
function Progress({ run: one }: { run: Run }) {
  const phase = one.phase.value;
  const progress = one.progress.value;
  if (phase === "writing") {
    return one.message.value ? null : (
      <article class="row assistant" aria-label={t("assistant")}>
        <LiveReply run={one} />
      </article>
    );
  }
  const reading = phase === "reading" && progress !== null;
  return (
    <div class="progress" role="status">
      {reading ? (
        <>
          <span>{t("reading", { done: count(progress.processed), all: count(progress.total) })}</span>
          <progress max={progress.total} value={progress.processed} aria-label={t("reading", { done: count(progress.processed), all: count(progress.total) })} />
        </>
      ) : (
        <>
          <span class="dots" aria-hidden="true">
            <i /><i /><i />
          </span>
          <span>{t("waiting")}</span>
        </>
      )}
    </div>
  );
}

function TroubleCard({ run: one, last }: { run: Run; last: Message | null }) {
  const trouble = one.trouble.value!;
  const waiting = one.phase.value !== "ended";
  const reply = one.message.value;
  const [title, more] = wordsOf(one);
  return (
    <div class="trouble" role="alert">
      <Icon name="warn" />
      <div>
        <strong>{title}</strong>
        <p>{more}</p>
        {!waiting && (
          <div class="trouble-actions">
            {trouble.kind === "full" && (
              <>
                <button type="button" class="primary" onClick={fitAndAsk}>{t("fitIt")}</button>
                {last?.role === "user" && (
                  <button type="button" onClick={() => void startWith(last.content).catch(complain)}>{t("startNew")}</button>
                )}
              </>
            )}
            {reply && !one.continues ? (
              <button type="button" class="primary" onClick={() => goOn(reply)}>{t("goOn")}</button>
            ) : null}
            <button type="button" class={trouble.kind === "full" ? "" : "primary"} onClick={again}>{t("retry")}</button>
          </div>
        )}
      </div>
    </div>
  );
}

function wordsOf(one: Run): [string, string] {
  const { kind, words } = one.trouble.value!;
  switch (kind) {
    case "gone":
      return [t("gone"), one.message.value ? t("goneReply") : t("goneMore")];
    case "queue":
      return [t("queue"), words];
    case "full":
      return [t("full"), t("fullMore", { n: count(model.value?.context_length ?? 0) })];
    case "limited":
      return [t("limited"), words];
    case "key":
      return [t("keyNeeded"), words];
    case "long":
      return [t("tooLong"), words];
    default:
      return [t("failed"), words];
  }
}

/** One line for screen readers when a reply is whole; the text itself would be read out word by word. */
function Announcer() {
  const words = useSignal("");
  const phase = run.value?.phase.value ?? "none";
  const before = useRef(phase);
  useEffect(() => {
    if (before.current === "writing" && phase !== "writing") words.value = t("replyDone");
    else if (phase === "waiting") words.value = t("waiting");
    before.current = phase;
  }, [phase]);
  return (
    <p class="unseen" role="status">
      {words}
    </p>
  );
}

function Greeting() {
  return (
    <div class="greeting">
      <h1>{t("greeting")}</h1>
      <p>{t("greetingSmall")}</p>
      <ul class="examples">
        {EXAMPLES.map((one) => (
          <li key={one.kind}>
            <button
              type="button"
              onClick={() => {
                set({ system: one.system[language.value] });
                const field = document.getElementById("message") as HTMLTextAreaElement;
                field.value = one.question[language.value];
                field.dispatchEvent(new Event("input", { bubbles: true }));
                field.focus();
              }}
            >
              <strong>{t(one.kind)}</strong>
              <span>{one.system[language.value]}</span>
            </button>
          </li>
        ))}
      </ul>
    </div>
  );
}

function copyCode(event: MouseEvent): void {
  const button = (event.target as Element).closest<HTMLButtonElement>('button[data-copy="code"]');
  if (!button) return;
  const code = button.closest(".code")?.querySelector("code")?.textContent ?? "";
  navigator.clipboard.writeText(code).then(
    () => {
      button.textContent = t("copied");
      setTimeout(() => (button.textContent = t("copy")), 1500);
    },
    (problem: unknown) => say(String(problem), true),
  );
}
