// Before the first paint, so that a chosen theme does not flash the other one. Not a module: modules wait for the document.
(function () {
  try {
    const theme = JSON.parse(localStorage.getItem("weft.theme"));
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  } catch {
    // Storage may be forbidden; the system's theme will do.
  }
})();
