// Completes <klora:subject:style> where the extension a1111-sd-webui-tagcomplete is installed. Nothing depends on this file.
(function () {
    "use strict";

    const OPENING = "<klora:";
    const BEGUN = /<k(?:l(?:o(?:r(?:a)?)?)?)?$/i;
    const OPEN_TAG = /<klora:(?:([^<>:]*):)?([^<>:]*)$/i;
    const FILE_ENDING = /\.(safetensors|ckpt|pt)$/i;

    // Where the tag is typed: a click on the list takes the focus away from there.
    let area = null;

    function beforeCursor() {
        const active = document.activeElement;
        area = active && typeof active.value === "string" ? active : area;
        return area ? area.value.slice(0, area.selectionStart) : "";
    }

    function loraNames() {
        const listed = typeof loras !== "undefined" && Array.isArray(loras) ? loras : [];
        const paths = listed.map((entry) => String(Array.isArray(entry) ? entry[0] : entry).trim());
        return paths.map((path) => path.split(/[\\/]/).pop().replace(FILE_ENDING, ""));
    }

    function choices() {
        const before = beforeCursor();
        const match = before.match(OPEN_TAG);
        if (!match) {
            return BEGUN.test(before) ? [OPENING] : [];
        }
        const [, subject, typed] = match;
        return loraNames().filter((name) => name !== subject && name.toLowerCase().includes(typed.toLowerCase()));
    }

    // Signs of the tag's own are written as in URLs.
    function quoted(name) {
        return name.replace(/[:<>=%+*]/g, (sign) => `%${sign.charCodeAt(0).toString(16).toUpperCase()}`);
    }

    // The subject is followed by the style, the style by the end of the tag. The extension puts this in the place of the
    // word at the cursor, which is all of an open tag, or its end where a name holds spaces.
    function completed(name) {
        if (name === OPENING) {
            return OPENING;
        }
        const before = beforeCursor();
        const [open, subject, typed] = before.match(OPEN_TAG);
        const whole = open.slice(0, open.length - typed.length) + quoted(name) + (subject === undefined ? ":" : ">");
        const word = typeof tagword === "string" && open.toLowerCase().endsWith(tagword) ? tagword.length : open.length;
        return whole.slice(open.length - word);
    }

    function addCompletion() {
        const needed = [typeof PARSERS, typeof BaseTagParser, typeof AutocompleteResult, typeof QUEUE_SANITIZE];
        if (needed.includes("undefined") || typeof ResultType === "undefined") {
            return;
        }
        // Of the known types the one that is followed neither by a comma nor by a space, keeps the list open, and is not
        // counted; a type of our own would be refused where uses are counted.
        const type = ResultType.wildcardFile;
        const offered = new Set();
        class KLoraParser extends BaseTagParser {
            parse() {
                offered.clear();
                return choices().map((name) => {
                    offered.add(name);
                    const result = new AutocompleteResult(name, type);
                    result.meta = "K-LoRA";
                    return result;
                });
            }
        }
        PARSERS.push(new KLoraParser(() => choices().length > 0));
        // The first answer counts.
        QUEUE_SANITIZE.unshift((found, text) => (found === type && offered.has(text) ? completed(text) : null));
    }

    function start() {
        try {
            addCompletion();
        } catch (error) {
            console.warn("K-LoRA: no completion of <klora: tags", error);
        }
    }

    if (typeof onUiLoaded === "function") {
        onUiLoaded(start);
    }
})();
