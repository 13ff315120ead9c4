// The two sliders of a window, "from" and "to", which style.css lays over each other, act as one with two handles: what lies
// between them is coloured, and neither is drawn past the other. Without this file they work, each for itself.
(function () {
    "use strict";

    const HANDLES = ".klora-window input[type=range]";

    function handlesOf(row) {
        return [...row.querySelectorAll("input[type=range]")];
    }

    function show(row) {
        const handles = handlesOf(row);
        if (handles.length < 2) {
            return;
        }
        const [from, to] = handles.map((found) => (found.value - found.min) / (found.max - found.min));
        row.style.setProperty("--klora-from", from);
        row.style.setProperty("--klora-to", to);
        // Where both lie at the end, the one that can still be moved is on top.
        handles[0].style.zIndex = from > 0.5 ? 2 : 1;
    }

    function showAll() {
        (typeof gradioApp === "function" ? gradioApp() : document).querySelectorAll(".klora-window").forEach(show);
    }

    // Before Gradio reads the handle.
    function keepApart(event) {
        const row = event.target.matches && event.target.matches(HANDLES) && event.target.closest(".klora-window");
        if (row) {
            const [from, to] = handlesOf(row);
            if (Number(from.value) > Number(to.value)) {
                event.target.value = (event.target === from ? to : from).value;
            }
        }
    }

    function start() {
        document.addEventListener("input", keepApart, true);
        document.addEventListener("input", () => setTimeout(showAll, 0));
        document.addEventListener("klora:changed", () => setTimeout(showAll, 0));
        showAll();
    }

    if (typeof onUiLoaded === "function") {
        onUiLoaded(start);
    } else if (document.readyState === "loading") {
        document.addEventListener("DOMContentLoaded", start);
    } else {
        start();
    }
})();
