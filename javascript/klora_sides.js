// The rows of a side of several LoRAs: a weight that is changed there, or a LoRA that is removed, goes into the side's own
// menu. Without this file the text of the menu is edited instead.
(function () {
    "use strict";

    const NONE = "None";
    const ROWS = "[id$=_klora_rows]";
    let typed = null;

    function root() {
        return typeof gradioApp === "function" ? gradioApp() : document;
    }

    function textOf(rows) {
        const parts = rows.map((row) => [row, Number(row.querySelector("input").value)]);
        if (parts.length === 1 && parts[0][1] === 1) {
            // A name alone stays as it is, signs and all. What the row shows of it a host may have translated.
            return decodeURIComponent(rows[0].dataset.name);
        }
        return parts.map(([row, weight]) => row.dataset.name + (weight === 1 ? "" : `*${weight}`)).join(" + ") || NONE;
    }

    function write(side, rows) {
        const tab = side.closest(ROWS).id.replace("_klora_rows", "");
        window.kloraSide = textOf(rows);
        root().querySelector(`#${tab}_klora_write_${side.dataset.side}`).click();
    }

    function rowsOf(side) {
        return [...side.querySelectorAll(".klora-part")];
    }

    function onChange(event) {
        const row = event.target.closest && event.target.closest(".klora-part");
        if (!row || !event.target.checkValidity() || event.target.value === "") {
            return;
        }
        const side = row.closest("[data-side]");
        const place = side.closest(ROWS);
        typed = { place, shown: row, side: side.dataset.side, index: rowsOf(side).indexOf(row) };
        write(side, rowsOf(side));
    }

    function onClick(event) {
        const row = event.target.closest && event.target.closest(".klora-part");
        if (row && event.target.closest("button")) {
            const side = row.closest("[data-side]");
            write(side, rowsOf(side).filter((other) => other !== row));
        }
    }

    // The rows are made anew; who typed a weight goes on typing there.
    function onMade() {
        if (typed && !document.contains(typed.shown) && document.activeElement === document.body) {
            const row = typed.place.querySelectorAll(`[data-side=${typed.side}] .klora-part`)[typed.index];
            typed = null;
            if (row) {
                row.querySelector("input").focus();
            }
        }
    }

    function start() {
        document.addEventListener("change", onChange);
        document.addEventListener("click", onClick);
        const made = new MutationObserver(onMade);
        root().querySelectorAll(ROWS).forEach((place) => made.observe(place, { childList: true, subtree: true }));
    }

    if (typeof onUiLoaded === "function") {
        onUiLoaded(start);
    } else if (document.readyState === "loading") {
        document.addEventListener("DOMContentLoaded", start);
    } else {
        start();
    }
})();
