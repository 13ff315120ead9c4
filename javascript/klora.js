// The accordion's title tells the active pair; <klora: completes LoRA names where the tag autocomplete is installed.
// Nothing depends on this file.
(function () {
    "use strict";

    const TITLE = "K-LoRA";

    function root() {
        return typeof gradioApp === "function" ? gradioApp() : document;
    }

    function valueOf(tab, name) {
        const input = root().querySelector(`#${tab}_klora_${name} input`);
        return input ? input.value : "";
    }

    function titleOf(tab) {
        const enabled = root().querySelector(`#${tab}_klora_enabled input[type=checkbox]`);
        if (!enabled || !enabled.checked) {
            return TITLE;
        }
        const pair = ["subject", "style"].map((side) => valueOf(tab, side)).map((name) => (name === "None" ? "" : name));
        return `${TITLE} · ${pair.map((name) => name || "?").join(" × ")}`;
    }

    function update(tab) {
        const label = root().querySelector(`#${tab}_klora > .label-wrap > span, #${tab}_klora > button.label-wrap > span`);
        if (label) {
            const title = titleOf(tab);
            if (label.textContent !== title) {
                label.textContent = title;
            }
            label.classList.toggle("klora-active", title !== TITLE);
        }
    }

    function updateAll() {
        ["txt2img", "img2img"].forEach(update);
    }

    // ---- the tag autocomplete extension, if there is one: a parser with a result type of its own

    const RESULT = "klora";
    const OPEN_TAG = /<klora:(?:[^<>:]*:)?([^<>:]*)$/i;

    function openTag() {
        const area = document.activeElement;
        const before = area && typeof area.value === "string" ? area.value.slice(0, area.selectionStart) : "";
        return before.match(OPEN_TAG);
    }

    function loraNames() {
        const found = typeof loras !== "undefined" && Array.isArray(loras) ? loras : [];
        return found.map((entry) => String(Array.isArray(entry) ? entry[0] : entry).trim().split(/[\\/]/).pop());
    }

    // The subject is followed by the style, the style by the end of the tag.
    function completed(name) {
        const match = openTag();
        if (!match) {
            return name;
        }
        const start = match[0].slice(0, match[0].length - match[1].length);
        return `${start}${name}${start.split(":").length > 2 ? ">" : ":"}`;
    }

    // The extension puts a comma behind what it does not know; within a tag there must be none.
    function withoutComma(type, text, _prompt, area) {
        if (type !== RESULT || !text || !text.endsWith(":")) {
            return null;
        }
        const end = area.value.indexOf(text) + text.length;
        const rest = area.value.slice(end).replace(/^,? /, "");
        area.value = area.value.slice(0, end) + rest;
        area.selectionStart = area.selectionEnd = end;
        if (typeof updateInput === "function") {
            updateInput(area);
        }
        return null;
    }

    function addCompletion() {
        const known = [typeof PARSERS, typeof BaseTagParser, typeof AutocompleteResult, typeof QUEUE_SANITIZE];
        if (known.includes("undefined")) {
            return;
        }
        class KLoraParser extends BaseTagParser {
            parse() {
                const match = openTag();
                const typed = match ? match[1].toLowerCase() : "";
                return loraNames().filter((name) => name.toLowerCase().includes(typed)).map((name) => {
                    const result = new AutocompleteResult(name, RESULT);
                    result.meta = TITLE;
                    return result;
                });
            }
        }
        PARSERS.push(new KLoraParser(() => openTag() !== null));
        QUEUE_SANITIZE.push((type, text) => (type === RESULT ? completed(text) : null));
        if (typeof QUEUE_AFTER_INSERT !== "undefined") {
            QUEUE_AFTER_INSERT.push(withoutComma);
        }
    }

    function start() {
        updateAll();
        document.addEventListener("input", () => setTimeout(updateAll, 50), true);
        document.addEventListener("change", () => setTimeout(updateAll, 50), true);
        document.addEventListener("click", () => setTimeout(updateAll, 200), true);
        try {
            addCompletion();
        } catch (error) {
            console.warn("K-LoRA: no completion of <klora: tags", error);
        }
    }

    if (typeof onUiLoaded === "function") {
        onUiLoaded(start);
    } else if (document.readyState === "loading") {
        document.addEventListener("DOMContentLoaded", start);
    } else {
        start();
    }
    if (typeof onAfterUiUpdate === "function") {
        onAfterUiUpdate(updateAll);
    }
})();
