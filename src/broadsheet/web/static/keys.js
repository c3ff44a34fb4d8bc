// ← and → turn the page where it has a previous or a next one; / goes to the search field.
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, select, [contenteditable]");
  if (typing || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const rel = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
  const link = rel && document.querySelector(`main a[rel=${rel}]`);
  if (link) link.click();
  const field = event.key === "/" && document.querySelector("main input[type=search], #find");
  if (field) {
    event.preventDefault();
    field.focus();
  }
});
