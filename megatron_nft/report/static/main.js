// Start: the overview at once, the answers when their tab is opened.

let browser = null;

async function openTab(name) {
  for (const button of document.querySelectorAll("nav button")) button.classList.toggle("on", button.dataset.tab === name);
  for (const id of ["overview", "answers"]) document.getElementById(id).hidden = id !== name;
  tip.hide();
  if (name === "answers") {
    browser ??= Promise.all([island("index"), island("tokens")])
      .then(([index, tokens]) => createBrowser(document.getElementById("answers"), index, tokens));
    await browser;
  }
  if (location.hash.slice(1) !== name) history.replaceState(null, "", `#${name}`);
}

async function start() {
  for (const button of document.querySelectorAll("nav button")) button.addEventListener("click", () => openTab(button.dataset.tab));
  const metrics = await island("metrics");
  if (metrics) drawCurves(metrics);
  if (location.hash === "#answers") await openTab("answers");
  document.documentElement.dataset.ready = Math.round(performance.now());
}

start().catch((error) => {
  document.getElementById("notes").append(make("li", {}, `this page could not be shown: ${error.message}`));
});
