// before the first paint, so that a page that is set to dark does not flash
(function () {
  try {
    var theme = localStorage.getItem("qwenlet.theme");
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  } catch (_) {
    // storage is forbidden: the system's theme holds
  }
})();
