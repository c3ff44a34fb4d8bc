// Keeps a run's page up to date while it works: its bar and log as they come, the rest whenever its state changes.
"use strict";
(() => {
  const part = () => document.getElementById("run");
  const number = part().dataset.run;
  let last = Number(part().dataset.last);

  async function reload() {
    const answer = await fetch(`/runs/${number}/state`);
    if (!answer.ok) return;
    const made = document.createElement("template");
    made.innerHTML = await answer.text();
    part().replaceWith(made.content);
    last = Math.max(last, Number(part().dataset.last));
  }

  function listen() {
    const source = new EventSource(`/runs/${number}/events?after=${last}`);
    const on = (kind, act) =>
      source.addEventListener(kind, (event) => {
        if (Number(event.lastEventId) <= last) return;
        last = Number(event.lastEventId);
        act(JSON.parse(event.data));
      });
    on("progress", ({ value, text }) => {
      const bar = document.getElementById("run-progress");
      if (!bar) return;
      bar.value = value;
      document.getElementById("run-doing").textContent = text;
    });
    on("log", ({ text }) => {
      const line = document.createElement("li");
      const time = document.createElement("time");
      time.textContent = new Date().toISOString().slice(11, 19);
      line.append(time, ` ${text}`);
      document.getElementById("run-log").append(line);
    });
    on("state", ({ state }) => {
      if (["done", "failed", "cancelled"].includes(state)) source.close();
      reload();
    });
    source.onerror = () => {
      if (source.readyState !== EventSource.CLOSED) return; // it connects again by itself
      setTimeout(async () => {
        await reload().catch(() => {});
        if (part().dataset.live === "yes") listen();
      }, 5000);
    };
  }

  listen();
})();
