/** What the browser remembers between visits; a browser that forbids it forgets, and says nothing. */

export function remembered(name: string): string | null {
  try {
    return localStorage.getItem(`qwenlet.${name}`);
  } catch {
    return null;
  }
}

/** Whether it could be kept. */
export function remember(name: string, value: string | null): boolean {
  try {
    if (value === null) localStorage.removeItem(`qwenlet.${name}`);
    else localStorage.setItem(`qwenlet.${name}`, value);
    return true;
  } catch {
    return false;
  }
}
