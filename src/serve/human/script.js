// Comfort only: the pages work without it. Digits answer the current question, Enter sends the page.
"use strict";

const form = document.querySelector("form");
if (form) {
    const groups = [...form.querySelectorAll("fieldset")];
    const answered = (group) => group.querySelector("input:checked") !== null;
    const current = () => groups.find((group) => !answered(group));
    const mark = () => groups.forEach((group) => group.classList.toggle("current", group === current()));
    form.addEventListener("change", mark);
    document.addEventListener("keydown", (event) => {
        if (event.ctrlKey || event.altKey || event.metaKey) return;
        const group = current();
        if (event.key >= "0" && event.key <= "9" && group) {
            const input = group.querySelector(`input[value="${event.key}"]`);
            if (!input) return;
            input.checked = true;
            event.preventDefault();
            mark();
            (current() ?? form.querySelector("button")).scrollIntoView({ block: "nearest" });
        } else if (event.key === "Enter" && !(event.target instanceof HTMLAnchorElement)) {
            event.preventDefault();
            form.requestSubmit();
        }
    });
    // One click, one request; the server counts a page once in any case.
    form.addEventListener("submit", () => { form.querySelector("button").disabled = true; });
    // The page may come back from the browser's cache with its button disabled.
    window.addEventListener("pageshow", () => { form.querySelector("button").disabled = false; mark(); });
    mark();
}
