/** What the page shows: the server, the conversations, the open one. Actions on conversations live here, replies in replies.ts. */

import { batch, computed, effect, signal } from "@preact/signals";
import { call, reachable, Refused, Unreachable } from "./http";
import { Forgotten, Kept, PAGE, type Change, type History } from "./history";
import { remember, remembered } from "./memory";
import { pathOf, refreshed, talkOf, withConversation, withCurrent, withMessage, leafBelow, type Talk } from "./tree";
import type { About, Conversation, Extra, Found, Message, Role, Sampling, Settings } from "./types";
import { t } from "./words";

// ---------------------------------------------------------------------------------------------------------- the server

export const about = signal<About | null>(null);
export const model = computed(() => about.value?.model ?? null);
export const keyNeeded = signal(false);
let history: History = new Kept();
const POLL_MS = 1500;

export function kept(): History {
  return history;
}

/** Asks the server what it is, and again for as long as it loads or does not answer. */
export async function meet(): Promise<void> {
  try {
    const told = await call<About>("/page/api/about");
    const first = about.value === null;
    if (first) history = told.history ? new Kept() : new Forgotten();
    about.value = told;
    keyNeeded.value = false;
    if (first) await Promise.all([listAnew(), followAddress()]);
    if (told.state === "loading") setTimeout(() => void meet(), POLL_MS);
  } catch (problem) {
    if (problem instanceof Refused && problem.status === 401) keyNeeded.value = true;
    else if (problem instanceof Refused) setTimeout(() => void meet(), POLL_MS);
  }
}

let knocking = 0;
effect(() => {
  if (reachable.value || knocking) return;
  knocking = window.setInterval(() => {
    void call("/health")
      .catch((problem: unknown) => {
        if (problem instanceof Unreachable) throw problem;
      })
      .then(() => {
        clearInterval(knocking);
        knocking = 0;
        void meet();
        void refresh();
      })
      .catch(() => undefined);
  }, POLL_MS);
});

// ---------------------------------------------------------------------------------------------------------- notices

export interface Notice {
  text: string;
  bad: boolean;
}
export const notice = signal<Notice | null>(null);
let noticeTimer = 0;

export function say(text: string, bad = false): void {
  clearTimeout(noticeTimer);
  notice.value = { text, bad };
  noticeTimer = window.setTimeout(() => (notice.value = null), bad ? 8000 : 3000);
}

/** What went wrong with keeping or finding something. */
export function complain(problem: unknown, what = t("notSaved")): void {
  if (problem instanceof Unreachable) say(`${t("gone")} ${t("goneMore")}`, true);
  else say(`${what} ${problem instanceof Error ? problem.message : ""}`, true);
}

// ---------------------------------------------------------------------------------------------------------- the list

export const conversations = signal<Conversation[]>([]);
export const moreToList = signal(false);
export const searched = signal<{ words: string; found: Found[] } | null>(null);

export async function listAnew(): Promise<void> {
  try {
    const length = Math.max(conversations.value.length, PAGE);
    const pages: Conversation[] = [];
    for (let offset = 0; offset < length; offset += PAGE) {
      const page = await history.list(offset);
      pages.push(...page);
      moreToList.value = page.length === PAGE;
      if (page.length < PAGE) break;
    }
    conversations.value = pages;
  } catch (problem) {
    complain(problem, "");
  }
}

export async function listMore(): Promise<void> {
  const page = await history.list(conversations.value.length).catch(() => []);
  moreToList.value = page.length === PAGE;
  const known = new Set(conversations.value.map((one) => one.id));
  conversations.value = [...conversations.value, ...page.filter((one) => !known.has(one.id))];
}

let searchTimer = 0;
export function search(words: string): void {
  clearTimeout(searchTimer);
  if (!words.trim()) {
    searched.value = null;
    return;
  }
  searchTimer = window.setTimeout(() => {
    history.search(words).then(
      (found) => (searched.value = { words, found }),
      (problem: unknown) => complain(problem, ""),
    );
  }, 150);
}

// ---------------------------------------------------------------------------------------------------------- the open one

export const talk = signal<Talk | null>(null);
export const path = computed<Message[]>(() => (talk.value ? pathOf(talk.value) : []));
/** Which message a search led to. */
export const sought = signal<string | null>(null);
/** Settings of the conversation that does not exist yet. */
const fresh = signal<Settings>({});
export const settings = computed<Settings>(() => talk.value?.conversation.settings ?? fresh.value);

const channel = "BroadcastChannel" in window ? new BroadcastChannel("qwenlet") : null;

function tell(id: string): void {
  channel?.postMessage(id);
}

let wanted: string | null = null;

/** Shows a conversation, at a message if one was sought. */
export async function open(id: string | null, message: string | null = null): Promise<void> {
  wanted = id;
  sought.value = null;
  address(id);
  if (id === null) {
    talk.value = null;
    return;
  }
  try {
    const tree = await history.tree(id);
    if (wanted !== id) return; // another one was chosen meanwhile
    let opened = talkOf(tree);
    if (message !== null && opened.byId.has(message) && !pathOf(opened).some((one) => one.id === message)) {
      opened = withCurrent(opened, leafBelow(opened, message));
      void history.change(id, { current: message });
    }
    batch(() => {
      talk.value = opened;
      sought.value = message;
    });
  } catch (problem) {
    if (wanted === id) {
      talk.value = null;
      address(null);
    }
    complain(problem, "");
  }
}

function address(id: string | null): void {
  const hash = id ? `#${id}` : "";
  if (location.hash !== hash) window.history.pushState(null, "", hash || location.pathname);
}

async function followAddress(): Promise<void> {
  const id = location.hash.slice(1);
  if (id !== (talk.value?.conversation.id ?? "")) await open(/^\w+$/.test(id) ? id : null);
}
window.addEventListener("popstate", () => void followAddress());

/** What others did meanwhile: another tab, the command line. */
export async function refresh(): Promise<void> {
  if (!about.value?.history) return;
  await listAnew();
  const shown = talk.value;
  if (!shown) return;
  try {
    const tree = talkOf(await history.tree(shown.conversation.id));
    // what changed here while it was read is newer
    if (talk.value === shown) talk.value = refreshed(shown, tree);
  } catch (problem) {
    if (problem instanceof Refused && problem.status === 404) {
      await open(null);
      say(t("deletedElsewhere"), true);
    }
  }
}

if (channel) {
  channel.onmessage = (event: MessageEvent<string>) => {
    if (talk.value?.conversation.id === event.data) void refresh();
    else void listAnew();
  };
}
document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "visible" && about.value) void refresh();
});

/** The open conversation, or a new one. */
export async function opened(): Promise<Conversation> {
  if (talk.value) return talk.value.conversation;
  const made = await history.create(model.value?.name ?? "", fresh.value);
  batch(() => {
    wanted = made.id;
    talk.value = talkOf({ conversation: made, messages: [] });
    conversations.value = [made, ...conversations.value];
    address(made.id);
  });
  return made;
}

/** Keeps a message and makes its branch the current one. */
export async function add(id: string, parent: string | null, role: Role, content: string, extra: Extra = {}): Promise<Message> {
  const message = await history.add(id, { parent, role, content, extra });
  if (talk.value?.conversation.id === id) {
    let next = withCurrent(withMessage(talk.value, message), message.id);
    if (!next.conversation.title && role === "user") next = withConversation(next, { title: titleOf(content) });
    talk.value = next;
    const one = { ...next.conversation, updated: message.created };
    conversations.value = [one, ...conversations.value.filter((other) => other.id !== id)];
  }
  tell(id);
  return message;
}

export async function update(id: string, message: Message, last = false): Promise<void> {
  if (talk.value?.conversation.id === id) talk.value = withMessage(talk.value, message);
  await history.update(message.id, message.content, message.extra, last);
  tell(id);
}

/** Shows the branch through a message. */
export async function select(message: string): Promise<void> {
  const shown = talk.value;
  if (!shown) return;
  talk.value = withCurrent(shown, leafBelow(shown, message));
  await change(shown.conversation.id, { current: message });
}

export async function change(id: string, what: Change, last = false): Promise<void> {
  const { current: _, ...rest } = what;
  batch(() => {
    if (talk.value?.conversation.id === id) talk.value = withConversation(talk.value, rest);
    conversations.value = conversations.value.map((one) => (one.id === id ? { ...one, ...rest } : one));
  });
  try {
    await history.change(id, what, last);
    tell(id);
  } catch (problem) {
    complain(problem);
  }
}

export async function remove(id: string): Promise<void> {
  try {
    await history.remove(id);
  } catch (problem) {
    if (!(problem instanceof Refused && problem.status === 404)) return complain(problem, "");
  }
  conversations.value = conversations.value.filter((one) => one.id !== id);
  if (searched.value) searched.value = { ...searched.value, found: searched.value.found.filter((one) => one.conversation.id !== id) };
  if (talk.value?.conversation.id === id) await open(null);
  tell(id);
}

let unsaved: { id: string; settings: Settings; timer: number } | null = null;

/** Keeps settings that wait for it. `last`: the page is closing, and the call has to outlive it. */
function keepSettings(last = false): void {
  if (!unsaved) return;
  const { id, settings, timer } = unsaved;
  clearTimeout(timer);
  unsaved = null;
  void change(id, { settings }, last);
}
window.addEventListener("pagehide", () => keepSettings(true));
document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "hidden") keepSettings(true); // where it ends here, phones say no more
});

/** Sets some of the settings; they are kept a moment after the last change. */
export function set(what: Settings): void {
  const shown = talk.value;
  if (!shown) {
    fresh.value = { ...fresh.value, ...what };
    return;
  }
  const { id } = shown.conversation;
  const next = { ...shown.conversation.settings, ...what };
  talk.value = withConversation(shown, { settings: next });
  if (unsaved?.id !== id) keepSettings(); // of a conversation that was left meanwhile
  clearTimeout(unsaved?.timer);
  unsaved = { id, settings: next, timer: window.setTimeout(keepSettings, 400) };
}

/** The settings as JSON has them: what is undefined is left to the model. */
export function setSampling(name: keyof Sampling, value: number | undefined): void {
  const sampling = { ...settings.value.sampling };
  if (value === undefined) delete sampling[name];
  else sampling[name] = value;
  set({ sampling });
}

export function startAnew(): void {
  // the next conversation begins as this one was set
  fresh.value = structuredClone(settings.value);
  void open(null);
}

function titleOf(question: string): string {
  const line = question.split("\n").find((each) => each.trim()) ?? "";
  const title = line.trim().replace(/\s+/g, " ");
  return title.length <= 60 ? title : `${title.slice(0, 59).trimEnd()}…`;
}

// ---------------------------------------------------------------------------------------------------------- looks

export type Theme = "auto" | "light" | "dark";
export const theme = signal<Theme>((remembered("theme") as Theme | null) ?? "auto");
effect(() => {
  if (theme.value === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme.value;
  remember("theme", theme.value === "auto" ? null : theme.value);
});

const wide = matchMedia("(min-width: 860px)");
export const sidebar = signal(wide.matches && remembered("sidebar") !== "closed");
export const panel = signal(false);
export const help = signal(false);
export const narrow = signal(!wide.matches);
wide.addEventListener("change", () => {
  narrow.value = !wide.matches;
  sidebar.value = wide.matches;
});

export function toggleSidebar(): void {
  sidebar.value = !sidebar.value;
  if (!narrow.value) remember("sidebar", sidebar.value ? null : "closed");
}
