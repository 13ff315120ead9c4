// What the accordion does in the page by itself: it shows its checkbox and the pair in its header, asks about the pair when
// the checkpoint changes, tells what lies under the pointer on the selection map, marks an analysis that no longer holds,
// and takes a balance from a grid of balances. Without this file everything still works.
(function () {
    "use strict";

    const TABS = ["txt2img", "img2img"];
    const GRID = /X Type: \[K-LoRA\] (Balance|Judged share), X Values: "?([-+\d.,\s]*\d)"?/;

    function root() {
        return typeof gradioApp === "function" ? gradioApp() : document;
    }

    function find(selector) {
        return root().querySelector(selector);
    }

    // A text in the language that the host shows.
    function say(text) {
        return (window.localization && window.localization[text]) || text;
    }

    // ---- the header

    function checkboxOf(tab) {
        return find(`#${tab}_klora_enabled input[type=checkbox]`);
    }

    function namesOf(tab) {
        return ["subject", "style"].map((side) => (find(`#${tab}_klora_${side} input`) || {}).value || "None");
    }

    function pairOf(tab) {
        const enabled = checkboxOf(tab);
        if (!enabled || !enabled.checked) {
            return "";
        }
        const names = namesOf(tab);
        return ` · ${names.includes("None") ? say("no pair yet") : names.join(" × ")}`;
    }

    // The checkbox that enables K-LoRA, shown in the header and apart from the fold; the real one stays where it is.
    function tickOf(tab, label) {
        let tick = label.querySelector(".klora-tick");
        if (!tick) {
            tick = document.createElement("input");
            tick.type = "checkbox";
            tick.className = "klora-tick";
            tick.addEventListener("click", (event) => {
                event.stopPropagation();
                const real = checkboxOf(tab);
                if (real && real.checked !== tick.checked) {
                    real.click();
                }
                setTimeout(updateHeaders, 50);
            });
            label.prepend(tick);
            find(`#${tab}_klora_enabled`).classList.add("klora-in-header");
        }
        return tick;
    }

    function updateHeader(tab) {
        const label = find(`#${tab}_klora > .label-wrap > span`);
        const real = checkboxOf(tab);
        if (!label || !real) {
            return;
        }
        const tick = tickOf(tab, label);
        tick.checked = real.checked;
        if (tick.title !== say("Enable K-LoRA")) {
            tick.title = say("Enable K-LoRA");
            tick.setAttribute("aria-label", tick.title);
        }
        let pair = label.querySelector(".klora-pair-name");
        if (!pair) {
            pair = document.createElement("span");
            pair.className = "klora-pair-name";
            label.append(pair);
        }
        if (pair.textContent !== pairOf(tab)) {
            pair.textContent = pairOf(tab);
        }
        nameControls(tab);
    }

    // Tooltips of our own, before the host gives them some of its for words that happen to be the same.
    function nameControls(tab) {
        root().querySelectorAll(`#${tab}_klora .block`).forEach((block) => {
            const name = block.querySelector("[data-testid=block-info], label > span");
            const text = name && name.textContent.trim();
            // A fold is no control: its name is not that of what is in it.
            if (text && !block.querySelector(".block")) {
                block.querySelectorAll("span:not([title]), button:not([title]), li:not([title])").forEach((found) => {
                    found.title = text;
                });
            }
        });
    }

    // ---- the pair and the checkpoint

    // Forge's own menu has no id.
    function checkpointMenu() {
        return find(":is(#setting_sd_model_checkpoint, .model_selection) :is(input, select)");
    }

    window.kloraCheckpoint = function () {
        return (checkpointMenu() || {}).value || "";
    };

    let checkpoint = null;

    function askAboutCheckpoint() {
        const chosen = window.kloraCheckpoint();
        if (chosen !== checkpoint && document.activeElement !== checkpointMenu()) {
            checkpoint = chosen;
            TABS.filter((tab) => !namesOf(tab).includes("None"))
                .forEach((tab) => find(`#${tab}_klora_ask_misfit`)?.click());
        }
    }

    // Whether the prompt holds a tag, which counts more than the accordion.
    window.kloraIsTyped = function (tab) {
        return ((find(`#${tab}_prompt textarea`) || {}).value || "").includes("<klora:");
    };

    // Whether there is something to compare balances of; says so where there is not.
    window.kloraHasPair = function (tab) {
        const found = window.kloraIsTyped(tab) || !namesOf(tab).includes("None");
        // A place of our own: what Gradio shows is left to it.
        root().querySelectorAll(`#${tab}_klora .klora-wanted`).forEach((old) => old.remove());
        if (!found) {
            const text = document.createElement("p");
            text.className = "klora-error klora-wanted";
            text.textContent = say("Choose a subject and a style first");
            find(`#${tab}_klora_result`).before(text);
        }
        return found;
    };

    function updateHeaders() {
        TABS.forEach(updateHeader);
    }

    // ---- the analysis

    function markStale(tab) {
        root().querySelectorAll(`#${tab}_klora .klora-wanted`).forEach((old) => old.remove());
        const stale = ["result .klora-result", "result .klora-error", "rule .klora-rule"];
        root().querySelectorAll(stale.map((found) => `#${tab}_klora_${found}`).join())
            .forEach((found) => found.classList.add("klora-stale"));
    }

    // Gradio tells of every control that has changed, by whomever.
    window.kloraChanged = function (tab) {
        markStale(tab);
        setTimeout(updateHeaders, 50);
        document.dispatchEvent(new CustomEvent("klora:changed"));
    };

    const told = new WeakMap();

    function mapOf(figure) {
        if (!told.has(figure)) {
            told.set(figure, JSON.parse(figure.dataset.klora));
        }
        return told.get(figure);
    }

    // Where on an element something is pointed at, as fractions of its width and height.
    function pointOn(element, event) {
        const box = element.getBoundingClientRect();
        return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    }

    // "attention 0" in another language: the number stays.
    function sayPlace(word) {
        const [, name, number] = word.match(/^(.*?)( \d+)?$/);
        return say(name) + (number || "");
    }

    function captionOf(figure, event) {
        const map = mapOf(figure);
        const [left, top, right, bottom] = map.box;
        const [x, y] = pointOn(figure.querySelector("img"), event);
        const column = Math.floor(((x - left) / (right - left)) * map.modules.length);
        const step = Math.floor(((y - top) / (bottom - top)) * map.steps);
        const module = map.modules[column];
        if (!module || step < 0 || step >= map.steps) {
            return null;
        }
        const who = { c: "subject", s: "style", b: "both", "-": "neither" }[module[1][step]];
        return `${module[0].map(sayPlace).join(" · ")} — ${say("step")} ${step + 1}/${map.steps}: ${say(who)}`;
    }

    function point(event) {
        const figure = event.target.closest && event.target.closest(".klora-map");
        if (!figure) {
            return;
        }
        const caption = figure.querySelector("figcaption");
        const idle = window.matchMedia("(hover: none)").matches ? caption.dataset.tap : caption.dataset.idle;
        const text = captionOf(figure, event) || say(idle || caption.dataset.idle);
        if (caption.textContent !== text) {
            caption.textContent = text;
        }
    }

    // ---- a grid of balances or shares: a click on a cell sets the slider

    // The text of the picture that a gallery shows large; the host writes that of the first cell below a grid.
    function infoOf(tab) {
        const small = [...root().querySelectorAll(`#${tab}_gallery .thumbnail-small`)];
        const index = Math.max(0, small.findIndex((found) => found.classList.contains("selected")));
        try {
            return JSON.parse(find(`#generation_info_${tab} textarea`).value).infotexts[index] || "";
        } catch (error) {
            return "";
        }
    }

    function balanceAt(event) {
        const image = event.target.closest && event.target.closest("#txt2img_gallery img, #img2img_gallery img");
        const tab = image && TABS.find((name) => image.closest(`#${name}_gallery`));
        if (!tab || image.closest(".thumbnails, .thumbnail-item, .grid-wrap")) {
            return null;
        }
        const info = infoOf(tab);
        const match = info.match(GRID);
        if (!match || /[YZ] Type: /.test(info)) {
            return null;
        }
        const values = match[2].split(",").map(Number);
        const box = image.getBoundingClientRect();
        const scale = Math.min(box.width / image.naturalWidth, box.height / image.naturalHeight);
        const width = image.naturalWidth * scale;
        const x = (event.clientX - box.left - (box.width - width) / 2) / width;
        const value = values[Math.floor(x * values.length)];
        return value === undefined ? null : { tab, image, value, isShare: match[1] !== "Balance" };
    }

    function setValue(input, value) {
        input.value = value;
        input.dispatchEvent(new Event("input", { bubbles: true }));
        input.dispatchEvent(new Event("change", { bubbles: true }));
    }

    function pickBalance(event) {
        const cell = event.button === 0 && !event.shiftKey ? balanceAt(event) : null;
        const name = cell && `#${cell.tab}_klora_${cell.isShare ? "share_slider" : "balance"}`;
        const slider = cell && find(`${name} input[type=number]`);
        if (!slider) {
            return;
        }
        event.preventDefault();
        event.stopImmediatePropagation();
        const byShare = find(`#${cell.tab}_klora_share_switch input`);
        if (byShare && byShare.checked !== cell.isShare) {
            byShare.click();
        }
        setValue(slider, cell.value);
        const block = find(name);
        block.classList.add("klora-picked");
        setTimeout(() => block.classList.remove("klora-picked"), 1200);
    }

    let named = null;

    function nameCell(event) {
        const cell = balanceAt(event);
        const image = cell && cell.image;
        if (named && named !== image) {
            // The gallery shows its next picture in the same element.
            named.removeAttribute("title");
        }
        named = image;
        if (cell) {
            const what = say(cell.isShare ? "Subject share" : "Balance");
            image.title = `${what} ${cell.value} — ${say("click: use it, Shift-click: enlarge")}`;
        }
    }

    // ---- all of it

    function start() {
        updateHeaders();
        for (const [event, delay] of [["input", 50], ["change", 50], ["click", 200]]) {
            document.addEventListener(event, () => setTimeout(updateHeaders, delay), true);
        }
        document.addEventListener("mousemove", (event) => { point(event); nameCell(event); });
        document.addEventListener("click", (event) => point(event));
        document.addEventListener("click", pickBalance, true);
        setInterval(askAboutCheckpoint, 1000);
        document.addEventListener("input", (event) => {
            TABS.filter((tab) => event.target.closest && event.target.closest(`#${tab}_steps`)).forEach(markStale);
        }, true);
    }

    if (typeof onUiLoaded === "function") {
        onUiLoaded(start);
    } else if (document.readyState === "loading") {
        document.addEventListener("DOMContentLoaded", start);
    } else {
        start();
    }
    if (typeof onAfterUiUpdate === "function") {
        onAfterUiUpdate(updateHeaders);
    }
})();
