"use strict";
(() => {
  const root = document.documentElement;
  const videos = [...document.querySelectorAll("video")];

  // All videos start together, so that the three of one prompt can be compared frame by frame.
  const playing = () => videos.some((video) => !video.paused);
  const toggle = document.getElementById("play-all");
  const show = () => { if (toggle) toggle.textContent = playing() ? "Pause all" : "Play all"; };
  const start = () => Promise.allSettled(videos.map((video) => { video.currentTime = 0; return video.play(); })).then(show);
  const pause = () => { videos.forEach((video) => video.pause()); show(); };
  toggle?.addEventListener("click", () => (playing() ? pause() : start()));
  document.getElementById("restart")?.addEventListener("click", start);
  document.getElementById("speed")?.addEventListener("change", (event) => {
    videos.forEach((video) => { video.playbackRate = Number(event.target.value); });
  });
  videos.forEach((video) => ["play", "pause"].forEach((name) => video.addEventListener(name, show)));
  addEventListener("load", start);

  // The system's theme until the button is used.
  document.getElementById("theme")?.addEventListener("click", () => {
    const dark = getComputedStyle(root).colorScheme === "dark"
      || (getComputedStyle(root).colorScheme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
    root.dataset.theme = dark ? "light" : "dark";
  });

  document.querySelectorAll("table.sortable").forEach((table) => {
    const body = table.tBodies[0];
    table.querySelectorAll("th button").forEach((button) => button.addEventListener("click", () => {
      const head = button.closest("th");
      const ascending = head.getAttribute("aria-sort") !== "ascending";
      table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const key = (row) => row.cells[head.cellIndex].dataset.value;
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        return x !== "" && y !== "" && !isNaN(x) && !isNaN(y)
          ? Number(x) - Number(y) : x.localeCompare(y, undefined, { numeric: true });
      });
      body.append(...(ascending ? rows : rows.reverse()));
    }));
  });

  document.querySelectorAll("button.copy").forEach((button) => button.addEventListener("click", () => {
    navigator.clipboard?.writeText(document.getElementById(button.dataset.source).textContent)
      .then(() => { button.textContent = "Copied"; });
  }));
})();
