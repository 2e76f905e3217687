// Opens a page of the report in Chromium, headless, and says as JSON what is there; or takes pictures of it.
//
//   node drive.mjs look CHROMIUM PAGE
//   node drive.mjs shoot CHROMIUM PAGE FOLDER [SECTION…]
//
// Run it where `npm ci` has put playwright-core and axe-core.

import { createRequire } from "node:module";
import path from "node:path";
import process from "node:process";
import { pathToFileURL } from "node:url";

const require = createRequire(path.join(process.cwd(), "package.json"));
const { chromium } = require("playwright-core");
const AXE = require("axe-core").source;

const [action, executablePath, page, folder, ...sections] = process.argv.slice(2);
const address = pathToFileURL(path.resolve(page)).href;
const WIDTHS = { desktop: [1280, 900], phone: [380, 800] };
const THEMES = ["light", "dark"];
// Of a picture, at most, in pixels of CSS: a longer page gives several.
const PART = 4000;

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });
try {
  if (action === "look") console.log(JSON.stringify(await look()));
  else await shoot();
} finally {
  await browser.close();
}

// ── what is there ─────────────────────────────────────────────────────────────────────────────────────────────────
async function look() {
  const found = { complaints: [], requests: [], views: {} };
  for (const [name, [width, height]] of Object.entries(WIDTHS)) {
    for (const colorScheme of THEMES) {
      const tab = await opened({ width, height }, colorScheme, found);
      found.views[`${name}, ${colorScheme}`] = {
        ...(await tab.evaluate(measured)),
        violations: await violations(tab),
      };
      if (name === "desktop" && colorScheme === "light") {
        found.tables = await tab.evaluate(tables);
        found.reached = await reached(tab);
        found.sorted = await sorted(tab);
        found.theme = await themed(tab);
      }
      await tab.context().close();
    }
  }
  found.plain = await withoutScripts();
  found.printed = await printed();
  return found;
}

async function opened(viewport, colorScheme, found) {
  const context = await browser.newContext({ viewport, colorScheme, bypassCSP: false });
  const tab = await context.newPage();
  tab.on("console", (message) => found.complaints.push(message.text()));
  tab.on("pageerror", (error) => found.complaints.push(String(error)));
  tab.on("request", (request) => {
    if (request.url() !== address && !request.url().startsWith("data:")) found.requests.push(request.url());
  });
  await tab.goto(address);
  return tab;
}

// Everything is opened, so that what is folded is looked at too.
async function violations(tab) {
  await tab.evaluate(() => document.querySelectorAll("details").forEach((each) => (each.open = true)));
  // By the driver's own door: the page's policy lets no other script in.
  await tab.evaluate(AXE);
  const { violations } = await tab.evaluate(() => axe.run(document, { resultTypes: ["violations"] }));
  return violations.map(({ id, nodes }) => `${id}: ${nodes.map((node) => node.html.slice(0, 160)).join(" | ")}`);
}

function measured() {
  const boxes = Array.from(document.querySelectorAll("figure"), (figure) => {
    const shown = Array.from(figure.querySelectorAll("svg")).filter((svg) => svg.checkVisibility());
    const { width, height } = shown[0]?.getBoundingClientRect() ?? { width: 0, height: 0 };
    const texts = shown.flatMap((svg) => Array.from(svg.querySelectorAll("text")));
    const frame = shown[0]?.getBoundingClientRect();
    const cut = texts.filter((text) => {
      const box = text.getBoundingClientRect();
      return box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
    });
    const letters = Math.min(...texts.map((text) => parseFloat(getComputedStyle(text).fontSize) * (width / shown[0].viewBox.baseVal.width)));
    return { figure: figure.id, shown: shown.length, width, height, letters, cut: cut.map((text) => text.textContent) };
  });
  const ids = Array.from(document.querySelectorAll("[id]"), (each) => each.id);
  return {
    background: getComputedStyle(document.documentElement).backgroundColor,
    headings: Array.from(document.querySelectorAll("h1, h2, h3, h4"), (each) => Number(each.tagName[1])),
    figures: boxes,
    repeated: ids.filter((id, place) => ids.indexOf(id) !== place),
    page: [document.documentElement.scrollWidth, document.documentElement.clientWidth],
  };
}

// Anchor of a table → its keys, and its rows of raw values: null where the cell has none.
function tables() {
  return Object.fromEntries(
    Array.from(document.querySelectorAll("table"), (table) => [
      table.querySelector("caption [id]").id.replace(/-caption$/, ""),
      {
        keys: Array.from(table.tHead.rows[0].cells, (head) => head.dataset.key),
        rows: Array.from(table.tBodies[0].rows, (row) => Array.from(row.cells, (cell) => cell.dataset.value ?? null)),
        texts: Array.from(table.tBodies[0].rows, (row) => Array.from(row.cells, (cell) => cell.textContent)),
      },
    ]),
  );
}

// What the tabulator key comes to, from the top of the page until it leaves it.
async function reached(tab) {
  await tab.evaluate(() => {
    document.querySelectorAll("details").forEach((each) => (each.open = false));
    window.scrollTo(0, 0);
    document.activeElement.blur();
  });
  const found = [];
  for (let presses = 0; presses < 400; presses += 1) {
    await tab.keyboard.press("Tab");
    const name = await tab.evaluate(() => {
      const at = document.activeElement;
      if (at === document.body) return null;
      const outlined = getComputedStyle(at).outlineStyle !== "none";
      const what = at.classList.contains("scroll") ? `region ${at.getAttribute("aria-labelledby")}` : at.localName;
      return `${what}${at.hash ?? ""}${outlined ? "" : " without a mark"}`;
    });
    if (name === null) break;
    found.push(name);
  }
  await tab.evaluate(() => document.querySelector("summary")?.focus());
  await tab.keyboard.press("Enter");
  return { found, opens: await tab.evaluate(() => document.querySelector("details")?.open ?? null) };
}

// The first table that can be sorted, by its last column of numbers: upwards, then downwards.
async function sorted(tab) {
  const head = tab.locator("thead th.number button").last();
  const values = () =>
    head.evaluate((button) => {
      const cell = button.closest("th");
      const rows = Array.from(cell.closest("table").tBodies[0].rows);
      return [cell.getAttribute("aria-sort"), rows.map((row) => row.cells[cell.cellIndex].dataset.value ?? null)];
    });
  const seen = [];
  await tab.evaluate(() => document.querySelectorAll("details").forEach((each) => (each.open = true)));
  for (let presses = 0; presses < 2; presses += 1) {
    await head.press("Enter");
    seen.push(await values());
  }
  return seen;
}

async function themed(tab) {
  await tab.getByRole("button", { name: "dark" }).click();
  return tab.evaluate(() => getComputedStyle(document.documentElement).backgroundColor);
}

async function withoutScripts() {
  const context = await browser.newContext({ javaScriptEnabled: false });
  const tab = await context.newPage();
  await tab.goto(address);
  const found = { figures: await tab.locator("figure svg:visible").count(), buttons: await tab.locator("button").count() };
  await context.close();
  return found;
}

// On paper the page is light, whatever the reader's screen is.
async function printed() {
  const context = await browser.newContext({ colorScheme: "dark" });
  const tab = await context.newPage();
  await tab.goto(address);
  await tab.emulateMedia({ media: "print", colorScheme: "dark" });
  const found = await tab.evaluate(() => getComputedStyle(document.documentElement).backgroundColor);
  await context.close();
  return found;
}

// ── pictures ──────────────────────────────────────────────────────────────────────────────────────────────────────
async function shoot() {
  const name = path.basename(page, path.extname(page));
  for (const [kind, width, height] of [["desktop", 1280, 900], ["phone", 390, 844]]) {
    for (const colorScheme of THEMES) {
      const context = await browser.newContext({ viewport: { width, height }, colorScheme, deviceScaleFactor: sections.length ? 1 : 2 });
      const tab = await context.newPage();
      await tab.goto(address);
      for (const section of sections) {
        const picture = path.join(folder, `${name}-${section}-${kind}-${colorScheme}.png`);
        const { y, height: tall } = await tab.locator(`#section-${section}`).boundingBox();
        await tab.screenshot({ path: picture, fullPage: true, clip: { x: 0, y, width, height: tall } });
        console.log(picture);
      }
      if (sections.length) {
        await context.close();
        continue;
      }
      const whole = await tab.evaluate(() => document.documentElement.scrollHeight);
      for (let part = 0; part * PART < whole; part += 1) {
        const number = whole > PART ? `-${part + 1}` : "";
        const picture = path.join(folder, `${name}-${kind}-${colorScheme}${number}.png`);
        const clip = { x: 0, y: part * PART, width, height: Math.min(PART, whole - part * PART) };
        await tab.screenshot({ path: picture, fullPage: true, clip });
        console.log(picture);
      }
      await context.close();
    }
  }
}
