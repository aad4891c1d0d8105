import { useSignal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { key, reachable } from "../http";
import { busy, stop } from "../replies";
import { about, change, help, keyNeeded, meet, model, notice, panel, sidebar, startAnew, talk, toggleSidebar, narrow } from "../state";
import { count, t, type Word } from "../words";
import { Composer } from "./Composer";
import { Dialog } from "./Dialog";
import { Icon, IconButton } from "./Icon";
import { Panel } from "./Panel";
import { Sidebar } from "./Sidebar";
import { Thread } from "./Thread";

export function App() {
  useEffect(() => {
    addEventListener("keydown", shortcut);
    return () => removeEventListener("keydown", shortcut);
  }, []);
  return (
    <div class={`page ${sidebar.value ? "with-sidebar" : ""} ${panel.value ? "with-panel" : ""}`}>
      {sidebar.value && (
        <>
          <Sidebar />
          <button type="button" class="scrim" aria-label={t("close")} onClick={toggleSidebar} />
        </>
      )}
      <main>
        <Head />
        <Banner />
        <Thread />
        <Composer />
      </main>
      {panel.value && <Panel />}
      {help.value && <Help />}
      {keyNeeded.value && <KeyDialog />}
      <p class={`notice ${notice.value ? "shown" : ""} ${notice.value?.bad ? "bad" : ""}`} role="status">
        {notice.value?.text}
      </p>
    </div>
  );
}

function Head() {
  return (
    <header class="head">
      {!sidebar.value && <IconButton icon="menu" label={t("sidebar")} expanded={false} onClick={toggleSidebar} hint="Ctrl+B" />}
      <Title />
      <ModelChip />
      <IconButton icon="plus" class="only-narrow" label={t("newChat")} onClick={startAnew} />
      <IconButton icon="sliders" label={t("settings")} expanded={panel.value} onClick={() => (panel.value = !panel.value)} hint="Ctrl+." />
    </header>
  );
}

function Title() {
  const naming = useSignal(false);
  const shown = talk.value?.conversation;
  if (!shown) return <span class="title" />;
  const done = (value: string) => {
    naming.value = false;
    if (value.trim() && value.trim() !== shown.title) void change(shown.id, { title: value.trim() });
  };
  if (naming.value)
    return (
      <input
        class="title"
        aria-label={t("rename")}
        defaultValue={shown.title}
        ref={(input) => input?.focus()}
        onBlur={(event) => done(event.currentTarget.value)}
        onKeyDown={(event) => {
          if (event.key === "Enter" && !event.isComposing) done(event.currentTarget.value);
          if (event.key === "Escape") {
            event.stopPropagation();
            naming.value = false;
          }
        }}
      />
    );
  return (
    <h1 class="title">
      <button type="button" title={t("rename")} onClick={() => (naming.value = true)}>
        {shown.title || t("untitled")}
      </button>
    </h1>
  );
}

function ModelChip() {
  const facts = model.value;
  if (!facts) return <span class="chip loading">{about.value ? t("loadingModel") : ""}</span>;
  const more = [
    t("parameters", { n: short(facts.parameters) }),
    facts.precision,
    facts.device,
    `${t("context")} ${count(facts.context_length)}`,
  ];
  return (
    <span class="chip" title={`${facts.name}\n${more.join("\n")}`}>
      <strong>{facts.name}</strong>
      <span>{facts.precision}</span>
    </span>
  );
}

function short(parameters: number): string {
  return parameters < 1e9 ? `${Math.round(parameters / 1e6)}M` : `${(parameters / 1e9).toFixed(1)}B`;
}

/** What keeps the whole page from working. */
function Banner() {
  const state = about.value?.state;
  const words = !reachable.value
    ? `${t("gone")} ${t("goneMore")}`
    : about.value?.trouble
      ? `${t("failed")} ${about.value.trouble}`
      : state === "draining"
        ? t("draining")
        : null;
  return words ? (
    <div class="banner" role="alert">
      <Icon name="warn" />
      {words}
    </div>
  ) : null;
}

function KeyDialog() {
  return (
    <Dialog title={t("keyNeeded")} onClose={() => (keyNeeded.value = false)} class="small">
      <form
        onSubmit={(event) => {
          event.preventDefault();
          key.value = new FormData(event.currentTarget).get("key")!.toString().trim();
          void meet();
        }}
      >
        <label for="key">{t("key")}</label>
        <input id="key" name="key" type="password" autocomplete="off" />
        <div class="dialog-foot">
          <button type="submit" class="primary">{t("open")}</button>
        </div>
      </form>
    </Dialog>
  );
}

const KEYS: [string, Word][] = [
  ["Enter", "keySend"],
  ["Shift+Enter", "keyLine"],
  ["Esc", "keyStop"],
  ["↑", "keyEdit"],
  ["Ctrl+Shift+O", "keyNew"],
  ["Ctrl+K", "keySearch"],
  ["Ctrl+.", "keySettings"],
  ["Ctrl+B", "keySidebar"],
  ["Shift+Esc", "keyFocus"],
  ["Ctrl+/", "keyHelp"],
];

function Help() {
  return (
    <Dialog title={t("shortcuts")} onClose={() => (help.value = false)} class="small">
      <dl class="keys">
        {KEYS.map(([keys, word]) => (
          <div key={word}>
            <dt>{keys.split("+").map((one) => <kbd key={one}>{one}</kbd>)}</dt>
            <dd>{t(word)}</dd>
          </div>
        ))}
      </dl>
    </Dialog>
  );
}

function shortcut(event: KeyboardEvent): void {
  if (event.isComposing) return;
  const control = event.ctrlKey || event.metaKey;
  const key = event.key.toLowerCase();
  if (event.key === "Escape" && event.shiftKey) {
    document.getElementById("message")?.focus();
  } else if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
    if (busy.value) stop();
    else if (narrow.value && sidebar.value) sidebar.value = false;
    else return;
  } else if (control && event.shiftKey && key === "o") startAnew();
  else if (control && !event.shiftKey && key === "k") {
    sidebar.value = true;
    requestAnimationFrame(() => document.getElementById("search")?.focus());
  } else if (control && key === ".") panel.value = !panel.value;
  else if (control && !event.shiftKey && key === "b") toggleSidebar();
  else if (control && key === "/") help.value = !help.value;
  else return;
  event.preventDefault();
}
