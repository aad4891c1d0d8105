/** Files in and out of the page. */

import { bytes, t } from "./words";

export const LARGEST_FILE = 4_000_000;

/** A text file's text. Throws an Error in words for what is none, or is too large. */
export async function textOf(file: File): Promise<string> {
  if (file.size > LARGEST_FILE) throw new Error(t("tooLarge", { name: file.name, most: bytes(LARGEST_FILE) }));
  const raw = await file.arrayBuffer();
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(raw);
    if (!text.includes("\0")) return text;
  } catch {
    // said below
  }
  throw new Error(t("notText", { name: file.name }));
}

export function download(name: string, content: string, kind: string): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type: kind }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** A title as the name of a file, on any system. */
export function fileName(title: string, ending: string): string {
  const plain = title.replace(/[\\/:*?"<>|\u0000-\u001f]/g, " ").replace(/\s+/g, " ").trim().slice(0, 60);
  return `${plain.replace(/^\.+/, "") || "qwenlet"}.${ending}`;
}
