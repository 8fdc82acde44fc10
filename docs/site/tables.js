// Line breaks in the cells of tables. Long names may break after one of their parts, numbers do not break, and a column
// of text is wide enough to read on a phone, where the table scrolls.
const NUMBERS = /^([A-Z]\w+( v\w+)?: )?(\d[\d.]*( (ms|µs|×|MB|%))?(, |$))+$/
for (const cell of document.querySelectorAll("article :is(th, td)")) {
  const length = cell.textContent.trim().length
  if (NUMBERS.test(cell.textContent.trim())) cell.style.whiteSpace = "nowrap"
  if (length > 80) cell.style.minWidth = "12em"
  for (const code of cell.querySelectorAll("code")) {
    const walker = document.createTreeWalker(code, NodeFilter.SHOW_TEXT)
    const texts = []
    while (walker.nextNode()) texts.push(walker.currentNode)
    for (const text of texts) {
      const parts = text.data.split(/(\S{15,})/).flatMap(word =>
        word.length < 15 ? [word] : word.split(/(?<=\w{3}[_.=(,/])(?=\w{2})/).flatMap(
          (part, i) => (i ? [document.createElement("wbr"), part] : [part])))
      text.replaceWith(...parts)
    }
  }
}
