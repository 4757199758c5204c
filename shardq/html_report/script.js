"use strict";
(() => {
  const data = JSON.parse(document.getElementById("rows").textContent);
  const PAGE = 200;
  const count = data.name.at.length;
  const word = (column, i) => data[column].words[data[column].at[i]];
  const names = new Array(count);
  let next = 0;
  for (let i = 0; i < count; i++) {
    names[i] = word("name", i).replace(/\{\}/g, () => data.numbers[next++]);
  }
  const value = (column, unit) => (i) => (data[column][i] === null ? null : data[column][i] * unit);
  const error = value("error", 1e-6);
  const columns = [
    ["tensor", (i) => names[i]],
    ["role", (i) => word("role", i)],
    ["outcome", (i) => word("outcome", i)],
    ["scheme", (i) => word("scheme", i) || word("rule", i)],
    ["shape", (i) => word("shape", i)],
    ["bytes", (i) => Number(word("bytes", i)), 0],
    ["error", error, 5],
    ...(data.other
      ? [["error there", value("other", 1e-6), 5], ["ratio", (i) => ratio(error(i), data.other[i] * 1e-6), 3]]
      : [["1 - cosine", value("distance", 1e-6), 6], ["saturated", value("saturated", 1e-4), 4],
         ["zeroed groups", (i) => data.zeroed[i] || 0, 0]]),
  ];
  function ratio(a, b) {
    return a === null || !b ? null : a / b;
  }
  const head = document.querySelector("#table thead tr");
  const body = document.querySelector("#table tbody");
  const told = document.getElementById("told");
  const more = document.getElementById("more");
  let sorted = columns.findIndex((c) => c[0] === "error");
  let descending = true;
  let shown = PAGE;
  let order = [];

  columns.forEach(([title, , digits], number) => {
    const th = document.createElement("th");
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = title;
    button.onclick = () => {
      descending = number === sorted ? !descending : digits !== undefined;
      sorted = number;
      arrange();
    };
    if (digits !== undefined) th.className = "n";
    th.append(button);
    head.append(th);
  });

  function arrange() {
    const words = document.getElementById("find").value.toLowerCase().split(/\s+/).filter(Boolean);
    const take = columns[sorted][1];
    const keys = new Array(count);
    order = [];
    for (let i = 0; i < count; i++) {
      const text = words.length ? columns.slice(0, 5).map((c) => c[1](i)).join(" ").toLowerCase() : "";
      if (words.every((w) => text.includes(w))) {
        keys[i] = take(i);
        order.push(i);
      }
    }
    const sign = descending ? -1 : 1;
    order.sort((a, b) => {
      const x = keys[a], y = keys[b];
      if (x === y) return a - b;
      if (x === null) return 1;
      if (y === null) return -1;
      return x < y ? -sign : sign;
    });
    [...head.children].forEach((th, i) =>
      i === sorted ? th.setAttribute("aria-sort", descending ? "descending" : "ascending") : th.removeAttribute("aria-sort"));
    shown = PAGE;
    fill();
  }

  function fill() {
    body.replaceChildren(...order.slice(0, shown).map((i) => {
      const tr = document.createElement("tr");
      for (const [, take, digits] of columns) {
        const td = document.createElement("td");
        const found = take(i);
        if (digits !== undefined) td.className = "n";
        td.textContent = found === null ? "" : digits === undefined ? found : found.toLocaleString("en", {
          minimumFractionDigits: digits, maximumFractionDigits: digits });
        tr.append(td);
      }
      return tr;
    }));
    told.textContent = `${Math.min(shown, order.length).toLocaleString("en")} of ${order.length.toLocaleString("en")} tensors`;
    more.hidden = shown >= order.length;
  }

  document.getElementById("find").oninput = arrange;
  more.onclick = () => {
    shown += PAGE;
    fill();
  };
  arrange();
})();
