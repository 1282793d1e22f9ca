"use strict";
// The page of `vilg serve`: everything that it shows comes from this server, and its history stays in the browser.

const TEXTS = {
    zh: {
        generate: "文字生成图像", count: "张数", seed: "种子", random: "随机", size: "尺寸", stop: "停止", go: "生成", more: "更多选项",
        temperature: "温度", guidance: "引导强度", negative: "不要出现（负面提示）", prompt: "想看到什么？例如：一轮弯月，扁平风格",
        look: "描述这张图", looking: "看图", askable: "看图与提问", drop: "把图像拖到这里，粘贴，或点击选择", ask: "提问",
        question: "关于这张图的问题，例如：图中有什么？", score: "比较匹配程度", texts: "与图像比较的文字，每行一句",
        history: "历史", kept: "只保存在这个浏览器中。", clear: "清空", token: "这台服务器需要令牌：", enter: "进入", save: "下载", close: "关闭",
        ready: "就绪", down: "服务器没有响应", working: "生成中…", reading: "正在看图…", doubtful: "可能不符", match: "匹配", again: "再次使用",
        stopped: "连接中断，图像没有完成。", language: "English", nothing: "模型没有给出文字。", unsure: "模型对这类图像不熟悉，描述可能有误。",
        full: "浏览器的存储空间已满，这些图像没有存入历史。",
    },
    en: {
        generate: "Text to image", count: "Images", seed: "Seed", random: "random", size: "Size", stop: "Stop", go: "Generate", more: "More options",
        temperature: "Temperature", guidance: "Guidance", negative: "Not in the image (negative prompt)",
        prompt: "What should the image show? In Chinese, such as 一轮弯月，扁平风格",
        look: "Describe this", looking: "Describe an image", askable: "Describe an image and ask", drop: "Drop an image here, paste one, or click to choose",
        ask: "Ask", question: "A question about the image, in Chinese: 图中有什么？", score: "Compare", texts: "Texts to compare with the image, one on each line",
        history: "History", kept: "Kept in this browser only.", clear: "Clear", token: "This server asks for a token:", enter: "Enter", save: "Save", close: "Close",
        ready: "ready", down: "the server does not answer", working: "generating…", reading: "looking…", doubtful: "may not fit", match: "match", again: "Use again",
        stopped: "The connection ended before the images were complete.", language: "中文", nothing: "The model wrote nothing.",
        unsure: "The model does not know images like this one; the caption may be wrong.", full: "The browser's storage is full; these images are not in the history.",
    },
};
const STYLES = ["扁平风格", "立体风格", "复古风格", "细腻风格", "现代风格"];
// Below this probability that image and text are a pair, the page says so.
const LEAST = 0.2;
const HISTORY = "vilg-history", KEPT = 40;

const $ = (id) => document.getElementById(id);
const make = (name, values = {}, ...children) => {
    const element = Object.assign(document.createElement(name), values);
    element.append(...children);
    return element;
};
let language = localStorage.getItem("vilg-language") || (navigator.language.startsWith("zh") ? "zh" : "en");
let model = null, running = null, lookedAt = null, looks = 0;
const t = (key) => TEXTS[language][key];

function translate() {
    document.documentElement.lang = language;
    document.querySelectorAll("[data-t]").forEach((element) => { element.textContent = t(element.dataset.t); });
    for (const [id, key] of [["prompt", "prompt"], ["seed", "random"], ["question", "question"], ["texts", "texts"]]) $(id).placeholder = t(key);
    for (const [id, key] of [["prompt", "generate"], ["question", "question"], ["texts", "texts"]]) $(id).setAttribute("aria-label", t(key));
    $("language").textContent = t("language");
    $("look-title").textContent = t(model?.answers ? "askable" : "looking");
    state($("state").dataset.key || "ready");
    showHistory();
}

function state(key) {
    $("state").dataset.key = key;
    $("state").textContent = model || key === "down" ? t(key) : "";
    $("state").classList.toggle("down", key === "down");
}

function say(id, text) {
    $(id).textContent = text || "";
    $(id).hidden = !text;
}

// Requests.

async function request(path, body, signal) {
    const token = sessionStorage.getItem("vilg-token"), headers = {};
    if (token) headers.Authorization = `Bearer ${token}`;
    if (body) headers["Content-Type"] = "application/json";
    let response;
    try {
        response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
    } catch (error) {
        if (error.name === "AbortError") throw error;
        lost();
        throw new Error(t("down"));
    }
    if (response.ok) return response;
    const problem = await response.json().catch(() => ({}));
    if (response.status === 401) askForToken();
    throw new Error(problem.error?.message || `${response.status} ${response.statusText}`);
}

// After the connection was lost, the page looks for the server until it is there again.
let looking = null;
function lost() {
    state("down");
    looking ||= setInterval(async () => {
        const there = await fetch("/healthz").then((response) => response.ok).catch(() => false);
        if (!there) return;
        clearInterval(looking);
        looking = null;
        state("ready");
        if (!model) start();
    }, 3000);
}

function askForToken() {
    sessionStorage.removeItem("vilg-token");
    $("token-section").hidden = false;
    $("token").focus();
}

async function* events(response) {
    const reader = response.body.getReader(), decoder = new TextDecoder();
    let text = "";
    for (;;) {
        const { done, value } = await reader.read();
        if (done) return;
        text += decoder.decode(value, { stream: true });
        const blocks = text.split("\n\n");
        text = blocks.pop();
        for (const block of blocks) {
            const data = block.split("\n").find((line) => line.startsWith("data: "));
            if (data) yield JSON.parse(data.slice(6));
        }
    }
}

// Text to image.

function matchText(match) {
    if (match === null || match === undefined) return "";
    return match < LEAST ? ` · ${t("doubtful")}` : ` · ${t("match")} ${Math.round(100 * match)} %`;
}

function frame() {
    const image = make("img", { alt: "" }), button = make("button", { type: "button", disabled: true }, image);
    const caption = make("figcaption");
    return { figure: make("figure", { className: "waiting" }, button, caption), image, button, caption, url: null };
}

async function generate() {
    const prompt = $("prompt").value.trim(), count = Number($("count").value), optional = {};
    if (!prompt || running || !model) return;
    if ($("seed").value) optional.seed = Number($("seed").value);
    for (const id of ["temperature", "guidance"]) if ($(id).value !== "") optional[id] = Number($(id).value);
    if ($("negative").value.trim()) optional.negative_prompt = $("negative").value.trim();
    running = new AbortController();
    const frames = Array.from({ length: count }, frame);
    $("images").classList.toggle("one", count === 1);
    $("images").replaceChildren(...frames.map((frame) => frame.figure));
    say("generate-message");
    ($("go").disabled = true, $("stop").hidden = false);
    state("working");
    let done = 0;
    try {
        const body = { prompt, n: count, size: $("size").value, stream: true, partial_images: model.rows, ...optional };
        const response = await request("/v1/images/generations", body, running.signal);
        for await (const event of events(response)) {
            if (event.error) throw new Error(event.error.message);
            const frame = frames[event.image_index];
            frame.url = frame.image.src = `data:image/png;base64,${event.b64_json}`;
            frame.figure.dataset.parts = Number(frame.figure.dataset.parts || 0) + 1;
            if (event.type === "image_generation.completed") {
                done += 1;
                frame.complete = { url: frame.url, seed: event.seed, match: event.match };
                finish(frame, prompt);
            }
        }
        if (done < count) throw new TypeError(t("stopped"));
        state("ready");
    } catch (error) {
        const left = error.name === "AbortError";
        if (error instanceof TypeError) lost();
        else if ($("state").dataset.key !== "down") state("ready");
        say("generate-message", left ? "" : error instanceof TypeError ? t("stopped") : error.message);
    }
    frames.filter((frame) => !frame.complete).forEach((frame) => frame.figure.classList.remove("waiting"));
    if (!frames.some((frame) => frame.url)) $("images").replaceChildren();
    ($("go").disabled = false, $("stop").hidden = true, running = null);
    const complete = frames.map((frame) => frame.complete).filter(Boolean);
    if (complete.length) remember({ prompt, time: Date.now(), images: complete });
}

function finish({ figure, image, button, caption, complete }, prompt) {
    figure.classList.remove("waiting");
    image.alt = prompt;
    button.disabled = false;
    button.onclick = () => enlarge(complete, prompt);
    caption.textContent = `${t("seed")} ${complete.seed}${matchText(complete.match)}`;
    caption.classList.toggle("doubtful", complete.match !== null && complete.match < LEAST);
}

function enlarge({ url, seed, match }, prompt) {
    const dialog = $("large"), link = dialog.querySelector("a");
    dialog.querySelector("img").src = url;
    dialog.querySelector("img").alt = prompt;
    dialog.querySelector("p").textContent = `${prompt} · ${t("seed")} ${seed}${matchText(match)}`;
    (link.href = url, link.download = `vilg-${seed}.png`);
    $("look-at").onclick = () => {
        dialog.close();
        look(url);
        $("drop").scrollIntoView({ behavior: "smooth", block: "center" });
    };
    dialog.showModal();
}

// Looking at an image.

const readFile = (file) => new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
});

// A photograph is made smaller before it is sent: the model sees it small anyway.
async function shrink(url) {
    const image = new Image();
    image.src = url;
    await image.decode();
    const scale = 1024 / Math.max(image.naturalWidth, image.naturalHeight);
    if (scale >= 1) return url;
    const canvas = make("canvas", { width: Math.round(image.naturalWidth * scale), height: Math.round(image.naturalHeight * scale) });
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    return canvas.toDataURL("image/png");
}

async function look(url) {
    const number = ++looks, isNewest = () => number === looks;
    say("look-message");
    $("answers").replaceChildren();
    $("scores").hidden = true;
    $("caption").textContent = t("reading");
    try {
        url = await shrink(url).catch(() => url);
        if (!isNewest()) return;
        lookedAt = url;
        ($("preview").src = url, $("preview").hidden = false, $("drop-text").hidden = true);
        document.querySelectorAll("#ask-form *, #score-form *").forEach((element) => { element.disabled = false; });
        const [best] = (await (await request("/v1/captions", { image: url })).json()).data;
        if (!isNewest()) return;
        $("caption").textContent = best?.caption || t("nothing");
        const doubtful = best && best.match !== null && best.match < LEAST;
        if (doubtful) $("caption").append(make("small", { className: "doubtful", textContent: t("unsure") }));
    } catch (error) {
        if (!isNewest()) return;
        $("caption").textContent = "";
        say("look-message", error.message);
    }
}

async function ask() {
    const question = $("question").value.trim(), image = lookedAt;
    if (!question || !image) return;
    say("look-message");
    try {
        const [best] = (await (await request("/v1/answers", { image, question })).json()).data;
        if (image !== lookedAt) return;
        $("answers").append(make("li", {}, make("span", { textContent: `${question} ` }), best?.answer || t("nothing")));
        $("question").value = "";
    } catch (error) {
        say("look-message", error.message);
    }
}

async function score() {
    const texts = $("texts").value.split("\n").map((text) => text.trim()).filter(Boolean), image = lookedAt;
    if (!texts.length || !image) return;
    say("look-message");
    try {
        const { data } = await (await request("/v1/scores", { image, texts })).json();
        if (image !== lookedAt) return;
        const row = ({ text, score, cosine }) => make("tr", {}, make("td", { textContent: text }),
            make("td", {}, make("meter", { min: 0, max: 1, value: score ?? Math.max(0, cosine) })),
            make("td", { textContent: score === null ? cosine.toFixed(3) : `${(100 * score).toFixed(1)} %` }));
        $("scores").tBodies[0].replaceChildren(...data.map(row));
        $("scores").hidden = false;
    } catch (error) {
        say("look-message", error.message);
    }
}

// History.

function stored() {
    try {
        const found = JSON.parse(localStorage.getItem(HISTORY) || "[]");
        return Array.isArray(found) ? found : [];
    } catch {
        return [];
    }
}

function remember(entry) {
    const entries = [entry, ...stored()].slice(0, KEPT);
    // A browser keeps some megabytes; the oldest images go first.
    while (entries.length) {
        try {
            localStorage.setItem(HISTORY, JSON.stringify(entries));
            break;
        } catch {
            entries.pop();
        }
    }
    if (!entries.length) say("generate-message", t("full"));
    showHistory();
}

function showHistory() {
    const entries = stored();
    $("clear").hidden = !entries.length;
    $("history").replaceChildren(...entries.map(({ prompt, time, images }) => {
        const thumb = (image) => make("button", { type: "button", onclick: () => enlarge(image, prompt) }, make("img", { src: image.url, alt: prompt }));
        const again = make("button", { type: "button", className: "plain", textContent: t("again") });
        again.onclick = () => {
            ($("prompt").value = prompt, $("seed").value = images[0].seed);
            showStyles();
            $("prompt").scrollIntoView({ behavior: "smooth", block: "center" });
        };
        const words = make("div", { className: "words" }, prompt, make("small", { textContent: new Date(time).toLocaleString(language) }));
        return make("div", { className: "entry" }, words, make("div", { className: "thumbs" }, ...images.slice(0, 6).map(thumb)), again);
    }));
}

// Styles that the built-in model knows.

function showStyles() {
    $("styles").querySelectorAll("button").forEach((chip) => chip.setAttribute("aria-pressed", $("prompt").value.includes(chip.textContent)));
}

function chip(style) {
    const button = make("button", { type: "button", textContent: style });
    button.onclick = () => {
        const has = $("prompt").value.includes(style);
        let text = STYLES.reduce((text, style) => text.replace(new RegExp(`[，,]?\\s*${style}`), ""), $("prompt").value).trim();
        if (!has) text = text ? `${text}，${style}` : style;
        $("prompt").value = text;
        showStyles();
    };
    return button;
}

async function start() {
    try {
        [model] = (await (await request("/v1/models")).json()).data;
    } catch (error) {
        if (!$("token-section").hidden) return;
        return say("generate-message", error.message);
    }
    $("token-section").hidden = true;
    say("generate-message");
    $("model").textContent = `${model.id} · ${model.image_size} × ${model.image_size}`;
    const side = (side) => make("option", { value: `${side}x${side}`, textContent: `${side} × ${side}` });
    $("size").replaceChildren(...[model.image_size, 256, 512].filter((side, i) => i === 0 || side > model.image_size).map(side));
    ($("temperature").placeholder = model.temperature, $("guidance").placeholder = model.guidance);
    $("styles").hidden = !model.demo;
    $("styles").replaceChildren(...STYLES.map(chip));
    $("ask-form").hidden = !model.answers;
    $("score-form").hidden = !model.scores;
    state("ready");
    translate();
}

const onSubmit = (id, work) => $(id).addEventListener("submit", (event) => {
    event.preventDefault();
    work();
});
onSubmit("generate-form", generate);
onSubmit("ask-form", ask);
onSubmit("score-form", score);
onSubmit("token-form", () => {
    sessionStorage.setItem("vilg-token", $("token").value.trim());
    $("token-section").hidden = true;
    start();
});
$("prompt").addEventListener("input", showStyles);
$("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        generate();
    }
});
$("stop").onclick = () => running?.abort();
$("clear").onclick = () => {
    localStorage.removeItem(HISTORY);
    showHistory();
};
$("language").onclick = () => {
    language = language === "zh" ? "en" : "zh";
    localStorage.setItem("vilg-language", language);
    translate();
};
const lookAtFile = async (file) => file && look(await readFile(file));
$("file").onchange = () => lookAtFile($("file").files[0]);
$("drop").onkeydown = (event) => { if (event.key === "Enter") $("file").click(); };
for (const kind of ["dragover", "dragleave", "drop"]) {
    $("drop").addEventListener(kind, (event) => {
        event.preventDefault();
        $("drop").classList.toggle("over", kind === "dragover");
        if (kind === "drop") lookAtFile(event.dataTransfer.files[0]);
    });
}
document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find((file) => file.type.startsWith("image/"));
    if (file) lookAtFile(file);
});
// Another tab has changed the history.
window.addEventListener("storage", (event) => { if (event.key === HISTORY || event.key === null) showHistory(); });
translate();
start();
