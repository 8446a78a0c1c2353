{
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  // Ascending float32 scores: the normal images, then every defect type's.
  const floats = (text) => {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    return Float64Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
  };
  const [normal, ...defects] = data.groups.map(floats);
  // Upper limits of the share of a count, for every count: of normal images, of defects, by type.
  const [normalLimits, defectLimits, ...typeLimits] = data.limits;
  // Of all defects with masks, then by type: scores of those highest on the defect, and limits.
  const places = (data.places || []).map(([scores, limits]) => [floats(scores), limits]);
  const slider = $("slider"), field = $("threshold"), gallery = $("gallery");
  const type = $("type"), outcome = $("outcome"), order = $("order"), zoom = $("zoom");
  const cards = [...gallery.children];
  const score = new Map(cards.map((card) => [card, Number(card.dataset.score)]));
  let threshold = data.start;  // null until one is chosen, where the run has none

  /* Threshold: counts, rates, verdicts. */

  const atLeast = (sorted, value) => {
    let low = 0, high = sorted.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (sorted[middle] >= value) high = middle;
      else low = middle + 1;
    }
    return sorted.length - low;
  };
  const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)} %` : "–");
  // As `verdicts.share_text`.
  const showShare = (place, count, limits) => {
    const total = limits.length - 1;
    if (!total) return place.replaceChildren("–");
    const range = [1 - limits[total - count], limits[count]].map((x) => (100 * x).toFixed(0));
    const small = document.createElement("small");
    small.textContent = `(${range[0]} to ${range[1]} %)`;
    place.replaceChildren(`${count} of ${total} `, small);
  };
  const showCount = (name, count, total) => {
    const place = $(`count-${name}`);
    place.textContent = total ? count : "–";
    place.classList.toggle("nothing", !count);
  };

  const showCounts = () => {
    const perDefect = defects.map((sorted) => atLeast(sorted, threshold));
    const anomalous = defects.reduce((sum, sorted) => sum + sorted.length, 0);
    const tp = perDefect.reduce((sum, count) => sum + count, 0);
    const fp = atLeast(normal, threshold);
    const fn = anomalous - tp, tn = normal.length - fp;
    showCount("found", tp, anomalous);
    showCount("missed", fn, anomalous);
    showCount("false-alarm", fp, normal.length);
    showCount("passed", tn, normal.length);
    showShare($("rate-recall"), tp, defectLimits);
    showShare($("rate-alarms"), fp, normalLimits);
    // Of images of one kind alone both would be about the test set, not the model.
    const both = anomalous && normal.length;
    $("rate-precision").textContent = both ? percent(tp, tp + fp) : "–";
    $("rate-f1").textContent = both ? ((2 * tp) / (2 * tp + fp + fn)).toFixed(4) : "–";
    for (const cell of document.querySelectorAll("[data-found]")) {
      const type = Number(cell.dataset.found);
      showShare(cell, perDefect[type], typeLimits[type]);
    }
    const showPlaces = (place, [sorted, limits]) =>
      showShare(place, atLeast(sorted, threshold), limits);
    if (places.length) showPlaces($("rate-place"), places[0]);
    for (const cell of document.querySelectorAll("[data-place]"))
      showPlaces(cell, places[1 + Number(cell.dataset.place)]);
    const dot = $("dot");
    if (both) {
      dot.setAttribute("cx", `${(100 * fp) / normal.length}%`);
      dot.setAttribute("cy", `${100 - (100 * tp) / anomalous}%`);
      dot.setAttribute("visibility", "visible");
    }
    return `${tp} found, ${fn} missed, ${fp} false alarms, ${tn} passed`;
  };

  // Called anomalous, but not at the defect.
  const isElsewhere = (card) =>
    card.dataset.verdict === "found" && card.dataset.inPlace === "0";

  const showVerdicts = () => {
    for (const card of cards) {
      const called = score.get(card) >= threshold;
      const verdict = card.dataset.label === "1"
        ? (called ? "found" : "missed")
        : (called ? "false alarm" : "passed");
      if (card.dataset.verdict !== verdict) {
        card.dataset.verdict = verdict;
        card.querySelector(".verdict").textContent = isElsewhere(card) ? "found elsewhere" : verdict;
      }
    }
  };

  const setThreshold = (given, from) => {
    const value = Math.fround(given);  // as NumPy compares it with float32 scores
    threshold = value;
    const part = (value - data.low) / (data.high - data.low);
    const place = `${100 * Math.min(Math.max(part, 0), 1)}%`;
    const cut = $("cut");
    cut.setAttribute("x1", place);
    cut.setAttribute("x2", place);
    cut.setAttribute("visibility", "visible");
    if (from !== slider) slider.value = Math.round(data.steps * part);
    if (from !== field) field.value = Number(value.toPrecision(6));
    document.documentElement.dataset.threshold = value;
    const counts = showCounts();
    slider.setAttribute("aria-valuetext", `${Number(value.toPrecision(4))}: ${counts}`);
    if (from !== slider) $("spoken").textContent = counts;
    for (const button of document.querySelectorAll("[data-named]"))
      button.setAttribute("aria-pressed", data.named[Number(button.dataset.named)] === value);
    showVerdicts();
    showGallery();
  };

  const atPart = (part) => data.low + (data.high - data.low) * part;
  slider.addEventListener("input", () => setThreshold(atPart(slider.value / data.steps), slider));
  field.addEventListener("input", () => {
    if (Number.isFinite(field.valueAsNumber)) setThreshold(field.valueAsNumber, field);
  });
  for (const button of document.querySelectorAll("[data-named]"))
    button.addEventListener("click", () => setThreshold(data.named[Number(button.dataset.named)]));

  const histogram = $("histogram");
  const follow = (event) => {
    const box = histogram.getBoundingClientRect();
    const part = (event.clientX - box.left) / box.width;
    setThreshold(atPart(Math.min(Math.max(part, 0), 1)));
  };
  histogram.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    histogram.setPointerCapture(event.pointerId);
    follow(event);
  });
  histogram.addEventListener("pointermove", (event) => {
    if (histogram.hasPointerCapture(event.pointerId)) follow(event);
  });

  /* Gallery: filters and order. */

  const wrong = (card) => (card.dataset.label === "1" ? threshold - score.get(card)
                                                      : score.get(card) - threshold);
  const keys = {
    high: (card) => -score.get(card),
    low: (card) => score.get(card),
    near: (card) => Math.abs(score.get(card) - threshold),
    wrong: (card) => -wrong(card),
  };
  let arranged = "high";

  function showGallery() {
    const wanted = outcome.value;
    const errors = ["missed", "false alarm"];
    let shown = 0;
    for (const card of cards) {
      const verdict = card.dataset.verdict;
      const fits = (!type.value || card.dataset.type === type.value) &&
        (!wanted || verdict === wanted || (wanted === "errors" && errors.includes(verdict)) ||
         (wanted === "elsewhere" && isElsewhere(card)));
      card.hidden = !fits;
      shown += fits;
    }
    // Moving cards costs time: only where their order may have changed.
    if (order.value !== arranged || order.value === "near" || order.value === "wrong") {
      const key = new Map(cards.map((card) => [card, keys[order.value](card)]));
      gallery.append(...cards.slice().sort((a, b) => key.get(a) - key.get(b)));
      arranged = order.value;
    }
    $("shown").textContent = `${shown} of ${cards.length}`;
    $("none").hidden = shown > 0;
  }

  for (const choice of [type, outcome, order]) choice.addEventListener("change", showGallery);
  $("toolbar").addEventListener("submit", (event) => event.preventDefault());
  for (const button of document.querySelectorAll("[data-filter]"))
    button.addEventListener("click", () => {
      outcome.value = button.dataset.filter;
      type.value = "";
      showGallery();
      $("gallery-title").scrollIntoView({ block: "start" });
    });

  /* One image, large: all its layers side by side. */

  let current = null;
  const visible = () => [...gallery.children].filter((card) => !card.hidden);

  const panel = (card, view, label) => {
    const figure = document.createElement("figure");
    const frame = document.createElement("div");
    frame.className = `frame fixed view-${view}`;
    for (const layer of card.querySelector(".frame").children) {
      const copy = layer.cloneNode(true);
      copy.removeAttribute("loading");
      frame.append(copy);
    }
    const caption = document.createElement("figcaption");
    caption.textContent = label;
    figure.append(frame, caption);
    return figure;
  };

  const enlarge = (card) => {
    current = card;
    const layers = [["image", "image"], ["heat", "heat map"], ["mask", "ground truth"],
                    ["lines", "outlines"]];
    $("zoom-title").textContent = card.querySelector(".what").title;
    $("zoom-facts").textContent = `score ${score.get(card).toFixed(3)}, ` +
      card.querySelector(".kind").textContent + (threshold === null ? "" :
        `: ${card.querySelector(".verdict").textContent} at threshold ` +
        `${Number(threshold.toPrecision(4))}`);
    $("panels").replaceChildren(...layers.map(([view, label]) => panel(card, view, label)));
    if (!zoom.open) zoom.showModal();
  };
  const step = (by) => {
    const list = visible();
    const next = list[list.indexOf(current) + by];
    if (next) enlarge(next);
  };
  gallery.addEventListener("click", (event) => {
    const frame = event.target.closest(".frame");
    if (frame) enlarge(frame.closest(".card"));
  });
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  $("close").addEventListener("click", () => zoom.close());
  zoom.addEventListener("click", (event) => {
    if (event.target === zoom) zoom.close();
  });
  zoom.addEventListener("close", () => {
    if (current) current.querySelector(".frame").focus();
  });

  /* Keys. */

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (zoom.open) {
      if (event.key === "ArrowLeft") step(-1);
      if (event.key === "ArrowRight") step(1);
      return;
    }
    const typing = event.target.matches("input[type=number], select");
    const view = ["image", "heat", "mask", "lines"][["1", "2", "3", "4"].indexOf(event.key)];
    if (view && !typing) $(`view-${view}`).checked = true;
    // From card to card, as in a grid.
    const card = event.target.closest(".card");
    if (card && event.key.startsWith("Arrow")) {
      const list = visible(), here = list.indexOf(card);
      const top = list[0].offsetTop;
      const columns = list.findIndex((other) => other.offsetTop > top);
      const row = columns < 0 ? list.length : columns;
      const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -row, ArrowDown: row }[event.key];
      const next = list[here + by];
      if (next) {
        next.querySelector(".frame").focus();
        event.preventDefault();
      }
    }
  });

  if (threshold !== null) setThreshold(threshold);
}
