// SD.Next's page translates its own words alone: there, this puts K-LoRA's into the language that the page is in.
// Elsewhere the host itself reads localizations/, and this does nothing.
(function () {
    "use strict";

    const FILES = { ja: "ja_JP", zh: "zh_CN" };
    const here = (document.currentScript || {}).src;
    let words = null;

    function language() {
        const chosen = String(window.opts.ui_locale || "Auto").split(":")[0];
        return (chosen === "Auto" ? navigator.language || "en" : chosen).split("-")[0];
    }

    function translate() {
        if (!words) {
            return;
        }
        const root = typeof gradioApp === "function" ? gradioApp() : document;
        root.querySelectorAll("[id*=klora]").forEach((part) => {
            const texts = document.createTreeWalker(part, NodeFilter.SHOW_TEXT);
            while (texts.nextNode()) {
                const found = words[texts.currentNode.nodeValue.trim()];
                if (found) {
                    texts.currentNode.nodeValue = found;
                }
            }
        });
    }

    async function load() {
        const file = window.opts && "ui_locale" in window.opts ? FILES[language()] : null;
        if (!file || !here) {
            return;
        }
        const answer = await fetch(new URL(`../localizations/${file}.json`, here));
        if (answer.ok) {
            words = await answer.json();
            // What klora.js puts together itself.
            window.localization = { ...words, ...window.localization };
            translate();
        }
    }

    if (typeof onUiLoaded === "function" && typeof onAfterUiUpdate === "function") {
        onUiLoaded(load);
        onAfterUiUpdate(translate);
    }
})();
