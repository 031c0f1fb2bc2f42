// The button for colours: as the system, light, dark. The choice is kept in this browser.

const THEME = "sagellm-theme";
const CHOICES = ["system", "light", "dark"];

function show(choice) {
  if (choice === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = choice;
  const text = `Colours: ${choice === "system" ? "as the system" : choice}`;
  const button = document.getElementById("theme");
  button.setAttribute("aria-label", text);
  button.title = text;
}

export function startTheme() {
  let choice = localStorage.getItem(THEME) ?? "system";
  show(choice);
  document.getElementById("theme").addEventListener("click", () => {
    choice = CHOICES[(CHOICES.indexOf(choice) + 1) % CHOICES.length];
    localStorage.setItem(THEME, choice);
    show(choice);
  });
}
