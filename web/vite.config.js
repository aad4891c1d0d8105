import { defineConfig } from "vite";

// faces that a browser can make of their regular ones; without them the page keeps to its 400 kB
const SPARED = /Caligraphic-Bold|Fraktur-Bold|Main-BoldItalic|SansSerif-Bold|SansSerif-Italic/;

/** KaTeX's style sheet with woff2 alone, and without the faces above. */
function katexFonts() {
  return {
    name: "katex-fonts",
    enforce: "pre",
    transform(code, id) {
      if (!id.includes("katex") || !id.includes(".css")) return null;
      return code
        .replace(/@font-face\s*\{[^}]*\}/g, (face) => (SPARED.test(face) ? "" : face))
        .replace(/,\s*url\([^)]*\.(?:woff|ttf)\)\s*format\(["'](?:woff|truetype)["']\)/g, "");
    },
  };
}

export default defineConfig({
  base: "/page/",
  plugins: [katexFonts()],
  build: {
    outDir: "../src/qwenlet/server/static",
    emptyOutDir: true,
    target: "es2022",
    modulePreload: { polyfill: false },
    assetsInlineLimit: 0,
    reportCompressedSize: false,
    license: { fileName: "licenses.md" },
    rollupOptions: { output: { entryFileNames: "assets/[name]-[hash].js" } },
  },
});
