/** Line drawings of 20 units, in the colour of the text around them. */

const PATHS = {
  plus: "M10 4v12M4 10h12",
  search: "M9 15A6 6 0 1 0 9 3a6 6 0 0 0 0 12ZM13.5 13.5 17 17",
  menu: "M3 5h14M3 10h14M3 15h9",
  sliders: "M3 6h8M15 6h2M3 14h2M9 14h8M13 4v4M7 12v4",
  send: "M10 16V4M5 9l5-5 5 5",
  stop: "M6 6h8v8H6Z",
  copy: "M7 7h9v10H7ZM13 7V3H4v10h3",
  check: "m4 10 4 4 8-8",
  edit: "m4 13-1 4 4-1 9-9-3-3ZM11.5 5.5l3 3",
  again: "M16 10a6 6 0 1 1-2-4.5M16 3v4h-4",
  play: "M6 4l10 6-10 6Z",
  left: "m12 5-5 5 5 5",
  right: "m8 5 5 5-5 5",
  down: "M10 4v12M5 11l5 5 5-5",
  dots: "M5 10h.01M10 10h.01M15 10h.01",
  close: "m5 5 10 10M15 5 5 15",
  clip: "M15 9l-5.5 5.5a3 3 0 0 1-4.2-4.2L11 4.5a2 2 0 0 1 2.9 2.9l-5.6 5.5a1 1 0 0 1-1.4-1.4L12 6.5",
  sun: "M10 13a3 3 0 1 0 0-6 3 3 0 0 0 0 6ZM10 2v2M10 16v2M2 10h2M16 10h2M4.3 4.3l1.4 1.4M14.3 14.3l1.4 1.4M4.3 15.7l1.4-1.4M14.3 5.7l1.4-1.4",
  moon: "M16 11.5A6.5 6.5 0 0 1 8.5 4a6.5 6.5 0 1 0 7.5 7.5Z",
  half: "M10 3a7 7 0 1 0 0 14 7 7 0 0 0 0-14ZM10 3v14",
  keyboard: "M2 5h16v10H2ZM5 8h.01M8 8h.01M11 8h.01M14 8h.01M6 12h8",
  tool: "M12 4a4 4 0 0 0-1 5l-7 7 1 1 7-7a4 4 0 0 0 5-5l-2.5 2.5-2-2Z",
  bin: "M4 6h12M8 6V4h4v2M6 6l1 11h6l1-11",
  warn: "M10 3 2.5 16.5h15ZM10 8v4M10 14.5h.01",
} as const;

export type IconName = keyof typeof PATHS;

export function Icon({ name }: { name: IconName }) {
  return (
    <svg class="icon" viewBox="0 0 20 20" aria-hidden="true" focusable="false">
      <path d={PATHS[name]} />
    </svg>
  );
}

interface ButtonProps {
  icon: IconName;
  label: string;
  onClick: (event: MouseEvent) => void;
  expanded?: boolean;
  disabled?: boolean;
  class?: string;
  hint?: string;
  /** For the page itself to find it. */
  action?: string;
}

/** A button that is an icon; its label is read out, and shown to who waits over it. */
export function IconButton({ icon, label, onClick, expanded, disabled, class: kind = "", hint, action }: ButtonProps) {
  return (
    <button
      type="button"
      class={`icon-button ${kind}`}
      aria-label={label}
      title={hint ? `${label} (${hint})` : label}
      data-action={action}
      aria-expanded={expanded}
      disabled={disabled}
      onClick={onClick}
    >
      <Icon name={icon} />
    </button>
  );
}
