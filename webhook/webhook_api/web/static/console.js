// Copy buttons, the browser's zone and the live list. Everything else works without this file.
"use strict";

for (const button of document.querySelectorAll("button.copy")) {
	button.hidden = !navigator.clipboard;
	button.addEventListener("click", async () => {
		const source = document.getElementById(button.dataset.copy);
		await navigator.clipboard.writeText(source.textContent);
		button.classList.add("copied");
		setTimeout(() => button.classList.remove("copied"), 1200);
	});
}

// The browser's own zone as a choice.
const zones = document.getElementById("zone");
const mine = Intl.DateTimeFormat().resolvedOptions().timeZone;
if (zones && mine && ![...zones.options].some((option) => option.value === mine)) zones.add(new Option(mine, mine));

const list = document.getElementById("live");
if (list && window.EventSource) {
	const most = 200;
	const says = document.getElementById("connection");
	const pause = document.getElementById("pause");
	const held = [];
	let paused = false;
	pause.hidden = false;

	const cell = (row, name, text, kind) => {
		const made = row.appendChild(document.createElement(name));
		if (kind) made.className = kind;
		made.textContent = text;
		return made;
	};
	const add = (seen) => {
		const row = document.createElement("tr");
		const head = cell(row, "th", "", "num");
		head.scope = "row";
		const link = head.appendChild(document.createElement("a"));
		link.href = "/deliveries/" + Number(seen.id);
		link.textContent = seen.id;
		const state = cell(row, "td", "").appendChild(document.createElement("span"));
		state.className = "pill " + seen.state;
		state.textContent = seen.state_word;
		const status = cell(row, "td", "").appendChild(document.createElement("span"));
		status.className = "status " + seen.status;
		status.textContent = seen.status_word;
		const time = cell(row, "td", "").appendChild(document.createElement("time"));
		time.dateTime = seen.at;
		time.textContent = seen.time;
		cell(row, "td", "", "cut").appendChild(document.createElement("bdi")).textContent = seen.request;
		cell(row, "td", "").appendChild(document.createElement("bdi")).textContent = seen.source;
		row.className = "new";
		list.prepend(row);
		while (list.rows.length > most) list.deleteRow(-1);
	};

	const source = new EventSource(list.dataset.events);
	source.addEventListener("open", () => {
		says.textContent = says.dataset.on;
		says.className = "connection on";
	});
	source.addEventListener("error", () => {
		says.textContent = says.dataset.off;
		says.className = "connection off";
	});
	source.addEventListener("message", (event) => {
		const seen = JSON.parse(event.data);
		if (paused) held.push(seen);
		else add(seen);
	});
	pause.addEventListener("click", () => {
		paused = !paused;
		pause.setAttribute("aria-pressed", String(paused));
		pause.textContent = paused ? pause.dataset.resume : pause.dataset.pause;
		if (!paused) held.splice(0).forEach(add);
	});
}
