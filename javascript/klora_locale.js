// SD.Next's page translates its own words alone: there, this puts K-LoRA's into the language that the page is in.
// Elsewhere the host itself reads localizations/, and this does nothing.
(function () {
    "use strict";

    const FILES = { ja: "ja_JP", zh: "zh_CN" };
    const PARTS = "#txt2img_klora, #img2img_klora, [id*=settings][id*=klora]";
    const WAIT_MS = 500, TRIES = 240;
    const here = (document.currentScript || {}).src;
    let waiting = false;

    function language() {
        const chosen = String(window.opts.ui_locale).split(":")[0];
        return (chosen === "Auto" ? navigator.language || "en" : chosen).split("-")[0];
    }

    function translate(words) {
        document.querySelectorAll(PARTS).forEach((part) => {
            const texts = document.createTreeWalker(part, NodeFilter.SHOW_TEXT);
            while (texts.nextNode()) {
                const found = words[texts.currentNode.nodeValue.trim()];
                if (found && !texts.currentNode.parentElement.closest(".klora-data")) {
                    texts.currentNode.nodeValue = found;
                }
            }
        });
    }

    async function start() {
        // The page gets its settings, and then its controls, some time after it is there.
        for (let i = 0; i < TRIES && !(window.opts && Object.keys(window.opts).length); i++) {
            await new Promise((resolve) => setTimeout(resolve, WAIT_MS));
        }
        const file = window.opts && window.opts.ui_locale ? FILES[language()] : null;
        const answer = file && here ? await fetch(new URL(`../localizations/${file}.json`, here)) : null;
        if (!answer || !answer.ok) {
            return;
        }
        const words = await answer.json();
        // For what klora.js puts together itself.
        window.localization = { ...words, ...window.localization };
        const again = () => {
            waiting = false;
            translate(words);
        };
        new MutationObserver(() => {
            if (!waiting) {
                waiting = true;
                setTimeout(again, WAIT_MS);
            }
        }).observe(document.body, { childList: true, subtree: true });
        translate(words);
    }

    if (document.readyState === "loading") {
        document.addEventListener("DOMContentLoaded", start);
    } else {
        start();
    }
})();
