// Formulas are set by MathJax, which stands beside this file: two megabytes, for the pages that have any.
if (document.querySelector(".arithmatex")) {
  window.MathJax = {
    tex: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]], packages: { "[-]": ["noundefined", "require", "autoload"] } },
    options: { ignoreHtmlClass: ".*", processHtmlClass: "arithmatex", enableMenu: false },
    svg: { displayAlign: "left", displayIndent: "1.5em" },
  }
  const script = document.createElement("script")
  script.src = new URL("mathjax.js", document.currentScript.src)
  document.head.append(script)
}
