import { useComputed, useSignal } from "@preact/signals";
import { useEffect, useLayoutEffect, useRef } from "preact/hooks";
import { textOf } from "../files";
import { call, Refused, Unreachable } from "../http";
import { remember, remembered } from "../memory";
import { ask, busy, run, stop, usedTokens } from "../replies";
import { complain, model, open, say, talk } from "../state";
import { bytes, count, t } from "../words";
import { Icon, IconButton } from "./Icon";

interface Attachment {
  name: string;
  text: string;
  /** Pasted, not a file: goes on as it is. */
  pasted: boolean;
}

interface Draft {
  text: string;
  attachments: Attachment[];
}

// a paste longer than this is shown as an attachment, so that the field stays a field
const LONG_PASTE = 6_000;
const NOTHING: Draft = { text: "", attachments: [] };
const COUNT_AFTER_MS = 500;
const COUNTED_UP_TO = 200_000;

function draftOf(id: string | null): Draft {
  try {
    const draft = JSON.parse(remembered(`draft.${id ?? "new"}`) ?? "null") as Draft | null;
    return draft && typeof draft.text === "string" && Array.isArray(draft.attachments) ? draft : NOTHING;
  } catch {
    return NOTHING;
  }
}

/** The question as the model reads it: what was typed, then what was attached. */
function whole({ text, attachments }: Draft): string {
  const parts = attachments.map((one) => (one.pasted ? one.text : `${one.name}:\n\n\`\`\`\n${one.text}\n\`\`\``));
  return [text.trim(), ...parts].filter(Boolean).join("\n\n");
}

export function Composer() {
  const id = talk.value?.conversation.id ?? null;
  const field = useRef<HTMLTextAreaElement>(null);
  const files = useRef<HTMLInputElement>(null);
  const draft = useSignal<Draft>(NOTHING);
  const draftTokens = useSignal(0);
  const sending = useRef(false);
  /** Whose draft it is; undefined before the first is read. */
  const owner = useRef<string | null | undefined>(undefined);
  const keepTimer = useRef(0);

  function put(next: Draft): void {
    draft.value = next;
    clearTimeout(keepTimer.current);
    const whose = owner.current ?? null;
    keepTimer.current = window.setTimeout(() => keep(whose, next), 300);
  }

  // before anything can be typed: an effect of the next frame would wipe the first letters away
  useLayoutEffect(() => {
    clearTimeout(keepTimer.current);
    if (!sending.current) {
      if (owner.current !== undefined) keep(owner.current, draft.value);
      draft.value = draftOf(id);
      field.current!.value = draft.value.text;
      grow(field.current!);
    }
    owner.current = id;
    if (matchMedia("(hover: hover)").matches) field.current!.focus();
  }, [id]);

  useEffect(() => {
    const leave = () => keep(owner.current ?? null, draft.value);
    addEventListener("pagehide", leave);
    return () => removeEventListener("pagehide", leave);
  }, []);

  useEffect(() => {
    const text = whole(draft.value);
    if (!text || text.length > COUNTED_UP_TO || !model.value) {
      draftTokens.value = text ? Math.ceil(text.length / 3) : 0;
      return;
    }
    const timer = setTimeout(() => {
      call<{ count: number }>("/tokenize", { body: { content: text } }).then(
        (told) => (draftTokens.value = told.count),
        () => undefined, // a meter may lag behind
      );
    }, COUNT_AFTER_MS);
    return () => clearTimeout(timer);
  }, [draft.value, model.value]);

  async function send(): Promise<void> {
    const sent = draft.value;
    const question = whole(sent);
    if (!question || busy.value || sending.current || !model.value) return;
    sending.current = true;
    try {
      await ask(question);
      if (draft.value === sent) {
        field.current!.value = "";
        put(NOTHING);
        grow(field.current!);
      }
      keep(id, NOTHING);
    } catch (problem) {
      if (problem instanceof Refused && problem.status === 404) {
        // deleted in another tab: what was typed moves to a conversation that does not exist yet
        keep(null, sent);
        await open(null);
        say(t("deletedElsewhere"), true);
      } else if (problem instanceof Refused && problem.status === 413) complain(problem, t("tooLong"));
      else if (problem instanceof Unreachable) say(`${t("gone")} ${t("goneMore")}`, true);
      else complain(problem);
    } finally {
      sending.current = false;
    }
  }

  async function attach(chosen: Iterable<File>): Promise<void> {
    for (const file of chosen) {
      try {
        const text = await textOf(file);
        put({ ...draft.value, attachments: [...draft.value.attachments, { name: file.name, text, pasted: false }] });
      } catch (problem) {
        say(problem instanceof Error ? problem.message : String(problem), true);
      }
    }
    field.current!.focus();
  }

  useEffect(() => {
    // files may be dropped anywhere on the page
    const over = (event: DragEvent) => {
      if (event.dataTransfer?.types.includes("Files")) event.preventDefault();
    };
    const drop = (event: DragEvent) => {
      const dropped = [...(event.dataTransfer?.files ?? [])];
      if (!dropped.length) return;
      event.preventDefault();
      void attach(dropped);
    };
    addEventListener("dragover", over);
    addEventListener("drop", drop);
    return () => {
      removeEventListener("dragover", over);
      removeEventListener("drop", drop);
    };
  }, []);

  function paste(event: ClipboardEvent): void {
    const { files: pasted } = event.clipboardData!;
    if (pasted.length) {
      event.preventDefault();
      void attach(pasted);
      return;
    }
    const text = event.clipboardData!.getData("text/plain");
    if (text.length <= LONG_PASTE) return;
    event.preventDefault();
    put({ ...draft.value, attachments: [...draft.value.attachments, { name: t("pasted"), text, pasted: true }] });
  }

  function key(event: KeyboardEvent): void {
    if (event.isComposing || event.keyCode === 229) return; // Enter chooses a character there
    if (event.key === "Enter" && !event.shiftKey && !event.altKey) {
      event.preventDefault();
      void send();
    } else if (event.key === "ArrowUp" && !field.current!.value) {
      const last = [...document.querySelectorAll<HTMLElement>('[data-role="user"] [data-action="edit"]')].at(-1);
      if (!last) return;
      event.preventDefault();
      last.click();
    }
  }

  const empty = !draft.value.text.trim() && !draft.value.attachments.length;
  return (
    <div class="composer">
      <form
        class="field"
        onSubmit={(event) => {
          event.preventDefault();
          void send();
        }}
      >
        {draft.value.attachments.length > 0 && (
          <ul class="attachments">
            {draft.value.attachments.map((one, place) => (
              <li key={place}>
                <span>{one.name}</span>
                <small>{bytes(one.text.length)}</small>
                <IconButton
                  icon="close"
                  label={t("removeAttachment", { name: one.name })}
                  onClick={() => put({ ...draft.value, attachments: draft.value.attachments.filter((_, other) => other !== place) })}
                />
              </li>
            ))}
          </ul>
        )}
        <textarea
          ref={field}
          id="message"
          rows={1}
          aria-label={t("message")}
          placeholder={t("placeholder")}
          enterkeyhint="send"
          onInput={(event) => {
            put({ ...draft.value, text: event.currentTarget.value });
            grow(event.currentTarget);
          }}
          onKeyDown={key}
          onPaste={paste}
        />
        <div class="field-foot">
          <IconButton icon="clip" label={t("attach")} onClick={() => files.current!.click()} />
          <input
            ref={files}
            type="file"
            multiple
            hidden
            aria-label={t("attach")}
            onChange={(event) => {
              const chosen = [...(event.currentTarget.files ?? [])];
              event.currentTarget.value = "";
              void attach(chosen);
            }}
          />
          <Meter draftTokens={draftTokens.value} />
          {busy.value ? (
            <IconButton icon="stop" class="send" label={t("stop")} onClick={stop} hint="Esc" />
          ) : (
            <button type="submit" class="icon-button send" aria-label={t("send")} title={t("send")} disabled={empty || !model.value}>
              <Icon name="send" />
            </button>
          )}
        </div>
      </form>
    </div>
  );
}

function keep(id: string | null, draft: Draft): void {
  const name = `draft.${id ?? "new"}`;
  const empty = !draft.text && !draft.attachments.length;
  // a browser has room for some megabytes: the attachments go first
  if (!remember(name, empty ? null : JSON.stringify(draft)) && draft.text) remember(name, JSON.stringify({ ...draft, attachments: [] }));
}

function grow(field: HTMLTextAreaElement): void {
  if (CSS.supports("field-sizing", "content")) return;
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, innerHeight * 0.4)}px`;
}

/** How full the context is, with what is being typed. */
function Meter({ draftTokens }: { draftTokens: number }) {
  const all = model.value?.context_length ?? 0;
  const speed = useComputed(() => {
    const one = run.value;
    const rate = one?.timings.value?.predicted_per_second;
    return one?.phase.value === "writing" && rate ? t("perSecond", { n: rate.toFixed(1) }) : "";
  });
  if (!all) return <div class="meter" />;
  const used = usedTokens.value + draftTokens;
  const share = Math.min(used / all, 1);
  return (
    <div class="meter">
      <span class="meter-words">{t("contextOf", { used: count(used), all: count(all) })}</span>
      <progress class={share > 0.85 ? "nearly" : ""} max={1} value={share} aria-label={t("context")} />
      <span class="meter-speed">{speed}</span>
    </div>
  );
}

