import type { ComponentChildren } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { download, fileName, textOf } from "../files";
import type { Form } from "../history";
import {
  about, change, complain, conversations, help, kept, listAnew, listMore, moreToList, narrow, open, remove, say, search, searched,
  sidebar, startAnew, talk, theme, toggleSidebar, type Theme,
} from "../state"; // prettier-ignore
import type { Conversation, Found } from "../types";
import { language, setLanguage, t, type Word } from "../words";
import { Dialog } from "./Dialog";
import { Icon, IconButton, type IconName } from "./Icon";

const THEMES: [Theme, IconName, Word][] = [
  ["auto", "half", "themeAuto"],
  ["light", "sun", "themeLight"],
  ["dark", "moon", "themeDark"],
];

export function Sidebar() {
  const file = useRef<HTMLInputElement>(null);
  const now = THEMES.findIndex(([name]) => name === theme.value);
  const [, themeIcon, themeLabel] = THEMES[now];
  return (
    <nav class="sidebar" aria-label={t("conversations")} id="sidebar">
      <div class="side-head">
        <strong class="brand">qwenlet</strong>
        <IconButton icon="menu" label={t("sidebar")} expanded onClick={toggleSidebar} hint="Ctrl+B" />
      </div>
      <button type="button" class="new-chat" onClick={() => leaveDrawer(startAnew)}>
        <Icon name="plus" />
        {t("newChat")}
      </button>
      <div class="search">
        <Icon name="search" />
        <input
          id="search"
          type="search"
          aria-label={t("search")}
          placeholder={t("search")}
          onInput={(event) => search(event.currentTarget.value)}
        />
      </div>
      <div class="side-list" tabIndex={-1}>
        {searched.value ? <Results found={searched.value.found} /> : <List />}
      </div>
      {about.value?.history === false && <p class="side-note">{t("historyOff")}</p>}
      <div class="side-foot">
        <button type="button" onClick={() => file.current!.click()}>
          {t("importFile")}
        </button>
        <button type="button" onClick={() => void saved(null, "json")} disabled={!conversations.value.length}>
          {t("exportAll")}
        </button>
        <input
          ref={file}
          type="file"
          hidden
          aria-label={t("importFile")}
          accept=".json,application/json"
          onChange={(event) => {
            const chosen = event.currentTarget.files?.[0];
            event.currentTarget.value = "";
            if (chosen) void imported(chosen);
          }}
        />
      </div>
      <div class="side-foot">
        <button type="button" lang={language.value === "zh" ? "en" : "zh-CN"} aria-label={t("languageLabel")} onClick={() => setLanguage(language.value === "zh" ? "en" : "zh")}>
          {t("language")}
        </button>
        <IconButton icon={themeIcon} label={t(themeLabel)} onClick={() => (theme.value = THEMES[(now + 1) % THEMES.length][0])} />
        <IconButton icon="keyboard" label={t("shortcuts")} onClick={() => (help.value = true)} hint="Ctrl+/" />
      </div>
    </nav>
  );
}

function leaveDrawer(then: () => void): void {
  if (narrow.value) sidebar.value = false;
  then();
}

function List() {
  if (!conversations.value.length) return <p class="side-note">{t("noConversations")}</p>;
  const groups = new Map<Word, Conversation[]>();
  for (const one of conversations.value) {
    const age = ageOf(one.updated);
    groups.set(age, [...(groups.get(age) ?? []), one]);
  }
  return (
    <>
      {[...groups].map(([age, group]) => (
        <section key={age} aria-label={t(age)}>
          <h2 class="side-title">{t(age)}</h2>
          <ul>
            {group.map((one) => (
              <Entry key={one.id} one={one} />
            ))}
          </ul>
        </section>
      ))}
      {moreToList.value && (
        <button type="button" class="side-more" onClick={() => void listMore()}>
          {t("more")}
        </button>
      )}
    </>
  );
}

function ageOf(seconds: number): Word {
  const midnight = new Date().setHours(0, 0, 0, 0) / 1000;
  if (seconds >= midnight) return "today";
  if (seconds >= midnight - 86_400) return "yesterday";
  return seconds >= midnight - 6 * 86_400 ? "thisWeek" : "earlier";
}

function Results({ found }: { found: Found[] }) {
  if (!found.length) return <p class="side-note" role="status">{t("nothingFound")}</p>;
  return (
    <ul aria-label={t("search")}>
      {found.map(({ conversation, message, excerpt }) => (
        <li key={`${conversation.id}${message ?? ""}`} class="entry">
          <button type="button" class="entry-open found" onClick={() => leaveDrawer(() => void open(conversation.id, message))}>
            <span class="entry-title">{conversation.title || t("untitled")}</span>
            {message && <span class="excerpt">{excerpt}</span>}
          </button>
        </li>
      ))}
    </ul>
  );
}

function Entry({ one }: { one: Conversation }) {
  const [menu, setMenu] = useState(false);
  const [naming, setNaming] = useState(false);
  const [asking, setAsking] = useState(false);
  const title = one.title || t("untitled");
  const current = talk.value?.conversation.id === one.id;
  if (naming) {
    const done = (value: string) => {
      setNaming(false);
      if (value.trim() && value.trim() !== one.title) void change(one.id, { title: value.trim() });
    };
    return (
      <li class="entry">
        <input
          class="entry-name"
          aria-label={t("rename")}
          defaultValue={one.title}
          ref={(input) => input?.focus()}
          onBlur={(event) => done(event.currentTarget.value)}
          onKeyDown={(event) => {
            if (event.key === "Enter" && !event.isComposing) done(event.currentTarget.value);
            if (event.key === "Escape") setNaming(false);
          }}
        />
      </li>
    );
  }
  const choose = (then: () => void) => () => {
    setMenu(false);
    then();
  };
  return (
    <li class={`entry ${current ? "current" : ""}`}>
      <button type="button" class="entry-open" aria-current={current ? "page" : undefined} title={title} onClick={() => leaveDrawer(() => void open(one.id))}>
        <span class="entry-title">{title}</span>
      </button>
      <IconButton icon="dots" class="entry-more" label={`${t("more")}: ${title}`} expanded={menu} onClick={() => setMenu(!menu)} />
      {menu && (
        <Menu onClose={() => setMenu(false)}>
          <button type="button" onClick={choose(() => setNaming(true))}>{t("rename")}</button>
          <button type="button" onClick={choose(() => void saved(one, "json"))}>{t("exportJson")}</button>
          <button type="button" onClick={choose(() => void saved(one, "markdown"))}>{t("exportMarkdown")}</button>
          <button type="button" class="danger" onClick={choose(() => setAsking(true))}>{t("remove")}</button>
        </Menu>
      )}
      {asking && (
        <Dialog title={t("really")} onClose={() => setAsking(false)} class="small">
          <p>{t("reallyMore", { title })}</p>
          <div class="dialog-foot">
            <button type="button" onClick={() => setAsking(false)}>{t("cancel")}</button>
            <button type="button" class="danger" onClick={() => { setAsking(false); void remove(one.id); }}>{t("remove")}</button>
          </div>
        </Dialog>
      )}
    </li>
  );
}

/** A few choices below a button; a press elsewhere, Tab or Esc closes it. */
function Menu({ children, onClose }: { children: ComponentChildren; onClose: () => void }) {
  const menu = useRef<HTMLDivElement>(null);
  useEffect(() => {
    menu.current!.querySelector("button")!.focus();
    const outside = (event: Event) => {
      if (!menu.current?.contains(event.target as Node)) onClose();
    };
    document.addEventListener("pointerdown", outside);
    return () => document.removeEventListener("pointerdown", outside);
  }, []);
  return (
    <div
      class="menu"
      role="group"
      ref={menu}
      onKeyDown={(event) => {
        if (event.key !== "Escape" && event.key !== "Tab") return;
        event.stopPropagation();
        onClose();
      }}
    >
      {children}
    </div>
  );
}

export async function saved(one: Conversation | null, form: Form): Promise<void> {
  try {
    const content = await kept().save(one?.id ?? null, form);
    const name = fileName(one ? one.title : "qwenlet", form === "json" ? "json" : "md");
    download(name, content, form === "json" ? "application/json" : "text/markdown");
    say(t("saved", { name }));
  } catch (problem) {
    complain(problem, "");
  }
}

export async function imported(file: File): Promise<void> {
  try {
    const made = await kept().load(await textOf(file));
    await listAnew();
    say(t("imported", { n: made.length }));
    if (made[0]) await open(made[0].id);
  } catch (problem) {
    complain(problem, t("badImport"));
  }
}
